//! `supercloud volume history`, `keep`, `point`, `clone`.

use anyhow::{Context as _, bail};
use reqwest::Method;
use supercloud_api::{
    CpuChoice, DiskFrom, GuestCreate, HistoryPolicy, OnLoss, Port, Propagation, VolumeAsOf, VolumeHistory,
    client::Client,
    history::{AsOfRefusal, verify},
    unix_ms,
};
use supercloud_cli::table::{Table, bytes, duration, time};

use crate::{
    arguments::{CloneArguments, HistoryVerb, Instant, Output},
    guests, show,
};

/// Checkpoints whose memory is kept where nothing is said.
const MEMORIES: u32 = 2;

/// Runs a verb.
pub async fn run(client: &Client, output: Output, verb: HistoryVerb) -> anyhow::Result<()> {
    match verb {
        HistoryVerb::History { name, instant, verify: is_verified, noted } => {
            if let Some(as_of_ms) = wanted(&instant) {
                let found = client.volume_as_of(&name, as_of_ms).await?;
                return show::print(output, &found, || as_of_table(&found));
            }
            let history = client.volume_history(&name).await?;
            if is_verified {
                check(&history, noted.as_deref())?;
            }
            show::print(output, &history, || table(&history))?;
            if output.is_for_people()
                && let Some(problem) = &history.problem
            {
                eprintln!("the last point that was due was not taken: {problem}");
            }
            Ok(())
        }
        HistoryVerb::Keep { name, off: true, trial, .. } => {
            if trial.dry_run {
                let history = client.volume_history(&name).await?;
                println!("{} points would go", history.points.len());
                return Ok(());
            }
            Ok(client.end_volume_history(&name).await?)
        }
        HistoryVerb::Keep { name, every, bands, memory, trial, .. } => {
            let memory = memory.map(|newest| newest.unwrap_or(MEMORIES));
            let policy = HistoryPolicy { every_s: every, keep: bands, memory };
            let history: VolumeHistory = if trial.dry_run {
                let path = format!("/v1/volumes/{name}/history?dry_run=true");
                client.call(Method::PUT, &path, &policy).await?
            } else {
                client.set_volume_history(&name, &policy).await?
            };
            show::print(output, &history, || table(&history))
        }
        HistoryVerb::Point { name } => {
            let history = client.take_volume_point(&name).await?;
            if client.is_trying() {
                return show::print(output, &history, || table(&history));
            }
            eprintln!("point {} is being taken; `supercloud volume history {name}` shows it", history.next);
            show::print(output, &history, || table(&history))
        }
        HistoryVerb::Clone(arguments) => clone(client, output, arguments).await,
    }
}

fn wanted(instant: &Instant) -> Option<u64> {
    instant.as_of.or(instant.ago.map(|ago_s| unix_ms().saturating_sub(ago_s.saturating_mul(1000))))
}

/// Checks a history here: whoever keeps it is not asked whether it is right.
fn check(history: &VolumeHistory, noted: Option<&str>) -> anyhow::Result<()> {
    let found = verify(history)?;
    eprintln!("the chain holds: {} points, {} thinned out, newest hash {}", found.points, found.thinned, history.head);
    let Some(noted) = noted else { return Ok(()) };
    if let Some(point) = history.points.iter().find(|point| point.hash == noted) {
        eprintln!("point {} of {} has the noted hash", point.number, time(point.at_ms));
        return Ok(());
    }
    if let Some(row) = history.thinned.iter().find(|row| row.hash == noted) {
        eprintln!("point {}, thinned out since, had the noted hash", row.to);
        return Ok(());
    }
    bail!("no point has the noted hash: it was thinned out together with its neighbours, or this is another history")
}

pub fn table(history: &VolumeHistory) -> Table {
    let mut table = Table::new(["POINT", "TIME", "EPOCH", "VERSION", "STORED", "MEMORY"]).and_wide(["CONTENT", "HASH"]);
    for point in &history.points {
        table.row_wide(
            [
                point.number.to_string(),
                time(point.at_ms),
                point.epoch.to_string(),
                point.version.to_string(),
                bytes(point.stored_bytes),
                match &point.memory {
                    Some(memory) if memory.is_kept => bytes(memory.bytes),
                    Some(_) => "gone".to_owned(),
                    None => "-".to_owned(),
                },
            ],
            [point.root.clone(), point.hash.clone()],
        );
    }
    table
}

fn as_of_table(found: &VolumeAsOf) -> Table {
    let mut table = Table::new(["POINT", "TIME", "OLDER_BY", "VERSION"]).and_wide(["CONTENT", "HASH"]);
    let point = &found.point;
    table.row_wide(
        [point.number.to_string(), time(point.at_ms), duration(found.older_ms), point.version.to_string()],
        [point.root.clone(), point.hash.clone()],
    );
    table
}

async fn clone(client: &Client, output: Output, arguments: CloneArguments) -> anyhow::Result<()> {
    let volume = client.volume(&arguments.name).await?;
    let history = client.volume_history(&volume.id.to_string()).await?;
    // Resolved once, so that what is said is what is made: a point that is thinned out meanwhile is refused.
    let number = match (arguments.point, wanted(&arguments.instant)) {
        (Some(number), _) => history.point(number)?.number,
        (None, Some(as_of_ms)) => {
            let found = client.volume_as_of(&volume.id.to_string(), as_of_ms).await?;
            let older = duration(found.older_ms);
            eprintln!(
                "point {} of {}, {older} before the instant asked for",
                found.point.number,
                time(found.point.at_ms)
            );
            found.point.number
        }
        (None, None) => history.points.last().map(|newest| newest.number).ok_or(AsOfRefusal::Empty)?,
    };
    let guest = volume.guest.context("the volume has no guest to take image, network and shape from")?;
    let guest = client.guest(&guest.to_string()).await?;
    let network = match arguments.network {
        Some(network) => network,
        None => {
            let ports: Vec<Port> = client.list("/v1/ports").await?;
            let port =
                ports.iter().find(|port| port.guest == guest.id).context("its guest has no network: --network")?;
            port.network.to_string()
        }
    };
    let body = GuestCreate {
        name: arguments.guest.parse()?,
        project: Some(volume.project.to_string().into()),
        image: guest.image.to_string().into(),
        shape: arguments.shape.unwrap_or(guest.shape),
        disk_from: Some(DiskFrom { volume: volume.id.to_string().into(), as_of_ms: None, point: Some(number) }),
        network: network.into(),
        ipv4: None,
        place: arguments.place.map(Into::into),
        disk_bytes: None,
        user_data: None,
        cmdline_extra: None,
        propagation: Propagation::default(),
        follow_prices: false,
        cpu: CpuChoice::default(),
        on_loss: OnLoss::default(),
        start: !arguments.no_start,
    };
    if arguments.trial.dry_run {
        return guests::rehearse(client, output, Method::POST, "/v1/guests", &body).await;
    }
    let operation = client.create_guest(&body).await?;
    show::follow(client, output, operation, arguments.watch).await
}
