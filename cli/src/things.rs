//! All nouns but `guest`.

use std::time::{Duration, Instant};

use anyhow::bail;
use futures::StreamExt as _;
use reqwest::Method;
use supercloud_api::{
    CloudCreate, Event, HostPatch, ImageCreate, JoinTokenCreate, NetworkCreate, OperationKind, Page, ProjectCreate,
    TokenCreate,
    client::{Client, ClientError, is_worth_a_retry},
};
use supercloud_cli::{
    fields::Names,
    table::{Table, bytes, time, usd},
};

use crate::{
    arguments::{
        CloudVerb, EventVerb, ExportFormat, ExportPart, HostVerb, ImageVerb, MarketVerb, NetworkVerb, Noun,
        OperationVerb, Output, ProjectVerb, StoreVerb, TokenVerb, VolumeVerb, Watch,
    },
    exports, listings, names, show, uploads,
};

/// How long after an event stream broke off it is opened again.
const STREAM_PAUSE: Duration = Duration::from_secs(1);
/// ... and at most, when it still does not come.
const STREAM_PAUSE_AT_MOST: Duration = Duration::from_secs(16);
/// How long a stream that was never there is asked for, as any other call is.
const FIRST_BUDGET: Duration = Duration::from_secs(20);
/// How long that is tried: a controller that restarts takes less.
const LOST_BUDGET: Duration = Duration::from_secs(120);

/// Runs a verb of one of these nouns.
pub async fn run(client: &Client, output: Output, noun: Noun) -> anyhow::Result<()> {
    match noun {
        Noun::Host(verb) => hosts(client, output, verb).await,
        Noun::Cloud(verb) => clouds(client, output, verb).await,
        Noun::Store(verb) => stores(client, output, verb).await,
        Noun::Project(verb) => projects(client, output, verb).await,
        Noun::Token(verb) => tokens(client, output, verb).await,
        Noun::Image(verb) => images(client, output, verb).await,
        Noun::Volume(verb) => volumes(client, output, verb).await,
        Noun::Link(verb) => crate::links::run(client, output, verb).await,
        Noun::Network(verb) => networks(client, output, verb).await,
        Noun::Migration(verb) => operations(client, output, verb, Some(OperationKind::GuestMigrate)).await,
        Noun::Operation(verb) => operations(client, output, verb, None).await,
        Noun::Plan(verb) => crate::plans::run(client, output, verb).await,
        Noun::Event(verb) => events(client, output, verb).await,
        Noun::Market(verb) => markets(client, output, verb).await,
        Noun::Ledger(arguments) => crate::ledger::run(client, output, &arguments).await,
        Noun::Whoami => show::print_named(client, output, &client.whoami().await?).await,
        Noun::Guest(_)
        | Noun::Group(_)
        | Noun::Console { .. }
        | Noun::Simulate(_)
        | Noun::Completion { .. }
        | Noun::Context(_)
        | Noun::Apply(_)
        | Noun::Top(_)
        | Noun::Api(_)
        | Noun::Explain { .. }
        | Noun::Man { .. } => unreachable!("run by main"),
    }
}

/// The names of what a wide listing refers to.
async fn wide_names<T: serde::Serialize>(client: &Client, output: Output, things: &T) -> anyhow::Result<Names> {
    if output != Output::Wide {
        return Ok(Names::new());
    }
    Ok(names::of_ids_in(client, &serde_json::to_value(things)?).await)
}

async fn hosts(client: &Client, output: Output, verb: HostVerb) -> anyhow::Result<()> {
    match verb {
        HostVerb::List => {
            let hosts = client.hosts().await?;
            let (rented, evacuations) = if output.is_for_people() {
                tokio::join!(names::rented(client), names::evacuations(client))
            } else {
                Default::default()
            };
            show::print(output, &hosts, || listings::hosts(&hosts, &rented, &evacuations))
        }
        HostVerb::Show { name } => show::print_named(client, output, &client.host(&name).await?).await,
        HostVerb::JoinToken { name, cloud, expires } => {
            let body = JoinTokenCreate { host_name: name.parse()?, cloud: cloud.into(), expires_in_s: expires };
            if client.is_trying() {
                // Of one that is not made there is no secret.
                return Ok(client.call(Method::POST, "/v1/join-tokens", &body).await?);
            }
            let token = client.create_join_token(&body).await?;
            match output {
                Output::Table | Output::Wide => {
                    println!("{}", token.token);
                    Ok(())
                }
                _ => show::print_one(output, &token),
            }
        }
        verb @ (HostVerb::Rent { .. } | HostVerb::Return { .. } | HostVerb::Rentings { .. }) => {
            crate::rentings::run(client, output, verb).await
        }
        HostVerb::Cordon { name } => {
            show::print_one(output, &client.patch_host(&name, &HostPatch { cordoned: Some(true) }).await?)
        }
        HostVerb::Uncordon { name } => {
            show::print_one(output, &client.patch_host(&name, &HostPatch { cordoned: Some(false) }).await?)
        }
        HostVerb::Remove { name, force } => show::print_one(output, &client.remove_host(&name, force).await?),
    }
}

async fn clouds(client: &Client, output: Output, verb: CloudVerb) -> anyhow::Result<()> {
    match verb {
        CloudVerb::List => {
            let clouds = client.clouds().await?;
            show::print(output, &clouds, || listings::clouds(&clouds))
        }
        CloudVerb::Create { name, provider } => {
            show::print_one(output, &client.create_cloud(&CloudCreate { name: name.parse()?, provider }).await?)
        }
    }
}

async fn stores(client: &Client, output: Output, verb: StoreVerb) -> anyhow::Result<()> {
    match verb {
        StoreVerb::List => {
            let stores = client.stores().await?;
            show::print(output, &stores, || {
                let mut table = Table::new(["NAME", "CHUNKS", "FREED", "FAILED SWEEPS"]);
                for store in &stores {
                    table.row([
                        store.name.clone(),
                        store.bytes.map_or_else(|| "-".to_owned(), bytes),
                        bytes(store.freed_bytes),
                        store.failed_sweeps.to_string(),
                    ]);
                }
                table
            })
        }
        StoreVerb::Sweep { name, accept_records } => {
            let store = client.sweep_store(&name, accept_records).await?;
            if client.is_trying() {
                return show::print_one(output, &store);
            }
            eprintln!("{} is being swept; `supercloud event list` tells what was removed", store.name);
            show::print_one(output, &store)
        }
    }
}

async fn projects(client: &Client, output: Output, verb: ProjectVerb) -> anyhow::Result<()> {
    match verb {
        ProjectVerb::List => {
            let projects = client.projects().await?;
            show::print(output, &projects, || listings::projects(&projects))
        }
        ProjectVerb::Create { name } => {
            show::print_one(output, &client.create_project(&ProjectCreate { name: name.parse()?, quota: None }).await?)
        }
    }
}

async fn tokens(client: &Client, output: Output, verb: TokenVerb) -> anyhow::Result<()> {
    match verb {
        TokenVerb::List => {
            let tokens = client.tokens().await?;
            let as_json = serde_json::to_value(&tokens)?;
            let is_told = output.is_for_people();
            let names = if is_told { names::of_ids_in(client, &as_json).await } else { Names::new() };
            show::print(output, &tokens, || listings::tokens(&tokens, &names))
        }
        TokenVerb::Create { name, project_scope, role, expires } => {
            let body = TokenCreate { name: name.parse()?, project: project_scope.into(), role, expires_in_s: expires };
            if client.is_trying() {
                return Ok(client.call(Method::POST, "/v1/tokens", &body).await?);
            }
            let made = client.create_token(&body).await?;
            match output {
                Output::Table | Output::Wide => {
                    println!("{}", made.secret);
                    Ok(())
                }
                _ => show::print_one(output, &made),
            }
        }
        TokenVerb::Delete { id } => Ok(client.delete_token(&id).await?),
    }
}

async fn images(client: &Client, output: Output, verb: ImageVerb) -> anyhow::Result<()> {
    match verb {
        ImageVerb::List => {
            let images = client.images().await?;
            let names = wide_names(client, output, &images).await?;
            show::print(output, &images, || listings::images(&images, &names))
        }
        ImageVerb::Show { name } => show::print_named(client, output, &client.image(&name).await?).await,
        ImageVerb::Sites { name } => {
            let sites = client.image_sites(&name).await?;
            show::print(output, &sites, || listings::sites(&sites))
        }
        ImageVerb::Import { file, name, kernel, initrd, cmdline } => {
            let name = match name {
                Some(name) => name,
                None => file.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default(),
            };
            // All there before anything is made of it.
            let files = uploads::open(file, kernel, initrd).await?;
            let image = match client.image(&name).await {
                // An upload that broke off goes on where it stopped.
                Ok(image) if image.state == supercloud_api::ImageState::Uploading => image,
                _ => client.create_image(&ImageCreate { name: name.parse()?, project: None, cmdline }).await?,
            };
            if client.is_trying() {
                return show::print_one(output, &image);
            }
            let operation = uploads::send(client, &image, files).await?;
            show::follow(client, output, operation, Watch { watch: true, no_watch: false }).await
        }
        ImageVerb::Export { name, file, format, part } => {
            if format == ExportFormat::Qcow2 && part != ExportPart::Disk {
                bail!("qcow2 is a format of disks: export the kernel and the initial RAM disk as raw");
            }
            let part = match part {
                ExportPart::Disk => "disk",
                ExportPart::Kernel => "kernel",
                ExportPart::Initrd => "initrd",
            };
            // By its id: the name may be given to another image meanwhile.
            let image = client.image(&name).await?;
            exports::run(client, format!("/v1/images/{}/parts/{part}/blocks", image.id), format.into(), file).await
        }
        ImageVerb::Delete { name } => Ok(client.delete_image(&name).await?),
    }
}

async fn volumes(client: &Client, output: Output, verb: VolumeVerb) -> anyhow::Result<()> {
    match verb {
        VolumeVerb::List => {
            let volumes = client.volumes().await?;
            let names = wide_names(client, output, &volumes).await?;
            show::print(output, &volumes, || listings::volumes(&volumes, &names))
        }
        VolumeVerb::History(verb) => crate::histories::run(client, output, verb).await,
        VolumeVerb::Show { name } => show::print_named(client, output, &client.volume(&name).await?).await,
        VolumeVerb::Sites { name } => {
            let sites = client.volume_sites(&name).await?;
            show::print(output, &sites, || listings::sites(&sites))
        }
        VolumeVerb::Export { name, file, format } => {
            let volume = client.volume(&name).await?;
            exports::run(client, format!("/v1/volumes/{}/blocks", volume.id), format.into(), file).await
        }
        VolumeVerb::Check { name, megabytes_per_s } => {
            let volume = client.check_volume(&name, megabytes_per_s * 1_000_000).await?;
            if client.is_trying() {
                return show::print_named(client, output, &volume).await;
            }
            eprintln!("{} is being checked; `supercloud event list` tells what was found", volume.name);
            show::print_named(client, output, &volume).await
        }
    }
}

async fn networks(client: &Client, output: Output, verb: NetworkVerb) -> anyhow::Result<()> {
    match verb {
        NetworkVerb::List => {
            let networks = client.networks().await?;
            let names = wide_names(client, output, &networks).await?;
            show::print(output, &networks, || listings::networks(&networks, &names))
        }
        NetworkVerb::Ports { network } => crate::links::ports(client, output, network.as_deref()).await,
        NetworkVerb::Flows { of } => crate::links::flows(client, output, &of).await,
        NetworkVerb::Show { name } => show::print_named(client, output, &client.network(&name).await?).await,
        NetworkVerb::Create { name, cidr, dns } => {
            let body = NetworkCreate { name: name.parse()?, project: None, cidr, dns };
            show::print_one(output, &client.create_network(&body).await?)
        }
        NetworkVerb::Delete { name } => Ok(client.delete_network(&name).await?),
    }
}

async fn operations(
    client: &Client,
    output: Output,
    verb: OperationVerb,
    kind: Option<OperationKind>,
) -> anyhow::Result<()> {
    match verb {
        OperationVerb::List => {
            let mut operations = client.operations().await?;
            operations.retain(|operation| kind.is_none_or(|kind| operation.kind == kind));
            let names = wide_names(client, output, &operations).await?;
            show::print(output, &operations, || listings::operations(&operations, &names))
        }
        OperationVerb::Show { id } => show::print_named(client, output, &client.operation(id.parse()?).await?).await,
        OperationVerb::Watch { id } => {
            let operation = client.operation(id.parse()?).await?;
            show::follow(client, output, operation, Watch { watch: true, no_watch: false }).await
        }
        OperationVerb::Cancel { id } => show::print_one(output, &client.cancel_operation(id.parse()?).await?),
    }
}

async fn events(client: &Client, output: Output, verb: EventVerb) -> anyhow::Result<()> {
    match verb {
        EventVerb::List { after } => {
            let events = all_events(client, after).await?;
            let names = match output.is_for_people() {
                true => names::of_ids_in(client, &serde_json::to_value(&events)?).await,
                false => Names::new(),
            };
            show::print(output, &events, || listings::events(&events, &names))
        }
        EventVerb::Watch { after } => watch_events(client, output, after).await,
        EventVerb::Verify => {
            let events = all_events(client, 0).await?;
            let (links, count) = (check_links(&events)?, events.len());
            if links != count {
                bail!(
                    "of {count} events {links} follow the one before as they shall; before the others there is a gap: events of \
                     other projects, or events that were taken away. A token for all projects, without --project, tells which"
                );
            }
            println!("{count} events, the chain holds");
            Ok(())
        }
    }
}

/// Shows events as they come. Where the connection is lost it is made again and goes on after the last one seen.
/// A controller that is away, or says that it is busy or just starting, is asked again, less and less often; an event that this program
/// cannot read is told and left behind.
async fn watch_events(client: &Client, output: Output, mut after: u64) -> anyhow::Result<()> {
    let (mut heard, mut budget, mut pause) = (Instant::now(), FIRST_BUDGET, STREAM_PAUSE);
    loop {
        let stream = match client.events(after).await {
            Ok(stream) => stream,
            Err(error) if is_worth_a_retry(&error) && heard.elapsed() + pause < budget => {
                eprintln!("{error}; asked again in {} s", pause.as_secs());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(STREAM_PAUSE_AT_MOST);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let mut stream = Box::pin(stream);
        loop {
            match stream.next().await {
                Some(Ok(event)) => {
                    after = event.seq;
                    show_event(output, &event)?;
                }
                Some(Err(error @ ClientError::UnknownEvent { seq, .. })) => {
                    eprintln!("{error}; it is left out");
                    // Where it does not say which one it is, the next one may: the stream goes on.
                    after = seq.map_or(after, |seq| seq.max(after));
                }
                Some(Err(error)) => {
                    eprintln!("{error}; connecting again");
                    break;
                }
                None => break,
            }
        }
        (heard, budget, pause) = (Instant::now(), LOST_BUDGET, STREAM_PAUSE);
        tokio::time::sleep(STREAM_PAUSE).await;
    }
}

fn show_event(output: Output, event: &Event) -> anyhow::Result<()> {
    match output {
        Output::Json | Output::Ndjson => println!("{}", serde_json::to_string(event)?),
        Output::Yaml => print!("---\n{}", supercloud_cli::yaml::render(&serde_json::to_value(event)?)),
        Output::Table | Output::Wide => {
            println!("{} {} {} {} {}", event.seq, time(event.at_ms), event.kind, event.actor, event.data);
        }
    }
    Ok(())
}

/// Checks each event whose predecessor is there, too; how many these are (the first of all has none and counts).
fn check_links(events: &[Event]) -> anyhow::Result<usize> {
    let mut links = 0;
    let mut before: Option<&Event> = None;
    for event in events {
        if event.seq == before.map_or(0, |before| before.seq) + 1 {
            if !event.follows(before) {
                bail!("the chain is broken at event {}", event.seq);
            }
            links += 1;
        }
        before = Some(event);
    }
    Ok(links)
}

async fn all_events(client: &Client, mut after: u64) -> anyhow::Result<Vec<Event>> {
    let mut all = Vec::new();
    loop {
        let Page { items, .. } = client.events_after(after).await?;
        let Some(last) = items.last() else { return Ok(all) };
        after = last.seq;
        all.extend(items);
    }
}

async fn markets(client: &Client, output: Output, verb: MarketVerb) -> anyhow::Result<()> {
    match verb {
        MarketVerb::List => {
            let markets = client.markets().await?;
            show::print(output, &markets, || listings::markets(&markets))
        }
        MarketVerb::Verdicts => crate::goodness::verdicts(client, output).await,
        MarketVerb::Prices { market } => {
            let series = client.prices(&market).await?;
            show::print(output, &series, || {
                let mut table = Table::new(["FEED TIME MS", "PRICE/H"]);
                for point in &series.points {
                    table.row([point.feed_time_ms.to_string(), usd(point.price_nanousd_per_hour)]);
                }
                table
            })
        }
    }
}
