//! All nouns but `guest`.

use std::path::Path;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use supercloud_api::{
    CloudCreate, Event, HostPatch, Image, ImageCreate, ImageImport, ImagePart, JoinTokenCreate, NetworkCreate,
    Operation, OperationKind, Page, ProjectCreate, TokenCreate, client::Client,
};
use supercloud_cli::{
    progress::phase_name,
    table::{Table, bytes, time, usd},
};
use tokio::io::AsyncReadExt as _;

use crate::{
    arguments::{
        CloudVerb, EventVerb, HostVerb, ImageVerb, ListShow, MarketVerb, NetworkVerb, Noun, OperationVerb, Output,
        ProjectVerb, TokenVerb, Watch,
    },
    show,
};

/// Upload pieces: the largest that the API takes.
const PIECE_BYTES: usize = 8 << 20;

/// Runs a verb of one of these nouns.
pub async fn run(client: &Client, output: Output, noun: Noun) -> anyhow::Result<()> {
    match noun {
        Noun::Host(verb) => hosts(client, output, verb).await,
        Noun::Cloud(verb) => clouds(client, output, verb).await,
        Noun::Project(verb) => projects(client, output, verb).await,
        Noun::Token(verb) => tokens(client, output, verb).await,
        Noun::Image(verb) => images(client, output, verb).await,
        Noun::Volume(verb) => volumes(client, output, verb).await,
        Noun::Network(verb) => networks(client, output, verb).await,
        Noun::Migration(verb) => operations(client, output, verb, Some(OperationKind::GuestMigrate)).await,
        Noun::Operation(verb) => operations(client, output, verb, None).await,
        Noun::Event(verb) => events(client, output, verb).await,
        Noun::Market(verb) => markets(client, output, verb).await,
        Noun::Ledger(arguments) => crate::ledger::run(client, output, &arguments).await,
        Noun::Whoami => show::print_one(output, &client.whoami().await?),
        Noun::Guest(_)
        | Noun::Simulate(_)
        | Noun::Completion { .. }
        | Noun::Api(_)
        | Noun::Explain { .. }
        | Noun::Man { .. } => unreachable!("run by main"),
    }
}

/// A unit enum as the API writes it.
fn word<T: serde::Serialize>(value: T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

async fn hosts(client: &Client, output: Output, verb: HostVerb) -> anyhow::Result<()> {
    match verb {
        HostVerb::List => {
            let hosts = client.hosts().await?;
            show::print(output, &hosts, || {
                let mut table = Table::new(["NAME", "CLOUD", "STATE", "VCPUS", "MEMORY", "CLASS", "SEEN"]);
                for host in &hosts {
                    table.row([
                        host.name.to_string(),
                        host.cloud_name.to_string(),
                        word(host.state),
                        format!("{}/{}", host.used.vcpus, host.capacity.vcpus),
                        format!("{} / {}", bytes(host.used.memory_bytes), bytes(host.capacity.memory_bytes)),
                        host.compat_classes.first().map_or_else(|| "-".into(), ToString::to_string),
                        time(host.last_seen_ms),
                    ]);
                }
                table
            })
        }
        HostVerb::Show { name } => show::print_one(output, &client.host(&name).await?),
        HostVerb::JoinToken { name, cloud, expires } => {
            let body = JoinTokenCreate { host_name: name.parse()?, cloud: cloud.into(), expires_in_s: expires };
            let token = client.create_join_token(&body).await?;
            match output {
                Output::Table => {
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
            show::print(output, &clouds, || {
                let mut table = Table::new(["NAME", "PROVIDER", "SINCE"]);
                for cloud in &clouds {
                    table.row([cloud.name.to_string(), cloud.provider.clone(), time(cloud.created_at_ms)]);
                }
                table
            })
        }
        CloudVerb::Create { name, provider } => {
            show::print_one(output, &client.create_cloud(&CloudCreate { name: name.parse()?, provider }).await?)
        }
    }
}

async fn projects(client: &Client, output: Output, verb: ProjectVerb) -> anyhow::Result<()> {
    match verb {
        ProjectVerb::List => {
            let projects = client.projects().await?;
            show::print(output, &projects, || {
                let mut table = Table::new(["NAME", "GUESTS AT MOST", "SINCE"]);
                for project in &projects {
                    table.row([
                        project.name.to_string(),
                        project.quota.guests.to_string(),
                        time(project.created_at_ms),
                    ]);
                }
                table
            })
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
            show::print(output, &tokens, || {
                let mut table = Table::new(["ID", "NAME", "ROLE", "PROJECT", "EXPIRES"]);
                for token in &tokens {
                    table.row([
                        token.id.to_string(),
                        token.name.to_string(),
                        word(token.role),
                        token.project.map_or_else(|| "*".into(), |project| project.to_string()),
                        token.expires_at_ms.map_or_else(|| "-".into(), time),
                    ]);
                }
                table
            })
        }
        TokenVerb::Create { name, project_scope, role, expires } => {
            let body = TokenCreate { name: name.parse()?, project: project_scope.into(), role, expires_in_s: expires };
            let made = client.create_token(&body).await?;
            match output {
                Output::Table => {
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
            show::print(output, &images, || {
                let mut table = Table::new(["NAME", "STATE", "SIZE", "STORED", "PARTS"]);
                for image in &images {
                    let sum = |size: fn(&supercloud_api::ImageContent) -> u64| image.parts.iter().map(size).sum();
                    let parts: Vec<String> = image.parts.iter().map(|part| word(part.part)).collect();
                    table.row([
                        image.name.to_string(),
                        word(image.state),
                        bytes(sum(|part| part.size_bytes)),
                        bytes(sum(|part| part.stored_bytes)),
                        parts.join(" "),
                    ]);
                }
                table
            })
        }
        ImageVerb::Show { name } => show::print_one(output, &client.image(&name).await?),
        ImageVerb::Import { file, name, kernel, initrd, cmdline } => {
            let name = match name {
                Some(name) => name,
                None => file.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default(),
            };
            let parts = [(ImagePart::Disk, Some(file)), (ImagePart::Kernel, kernel), (ImagePart::Initrd, initrd)];
            // All there before anything is made of it.
            let mut files = Vec::new();
            for (part, path) in parts {
                if let Some(path) = path {
                    files.push((part, open_part(&path).await?));
                }
            }
            let image = match client.image(&name).await {
                // An upload that broke off goes on where it stopped.
                Ok(image) if image.state == supercloud_api::ImageState::Uploading => image,
                _ => client.create_image(&ImageCreate { name: name.parse()?, project: None, cmdline }).await?,
            };
            for (part, file) in files {
                upload(client, &image, part, file).await?;
            }
            let operation = client.import_image(&image.id.to_string(), &ImageImport::default()).await?;
            show::follow(client, output, operation, Watch { watch: true, no_watch: false }).await
        }
        ImageVerb::Delete { name } => Ok(client.delete_image(&name).await?),
    }
}

async fn open_part(path: &Path) -> anyhow::Result<tokio::fs::File> {
    let file = tokio::fs::File::open(path).await.with_context(|| format!("opening {}", path.display()))?;
    let about = file.metadata().await.with_context(|| format!("reading {}", path.display()))?;
    anyhow::ensure!(about.is_file() && about.len() > 0, "{} is not a file with anything in it", path.display());
    Ok(file)
}

/// Uploads a part from where the controller has it.
async fn upload(client: &Client, image: &Image, part: ImagePart, mut file: tokio::fs::File) -> anyhow::Result<()> {
    let size = file.metadata().await?.len();
    let mut offset = image.uploaded.iter().find(|u| u.part == part).map_or(0, |u| u.bytes);
    if offset > size {
        bail!("the controller has {offset} bytes of this part, more than the file has: is it another one?");
    }
    tokio::io::AsyncSeekExt::seek(&mut file, std::io::SeekFrom::Start(offset)).await?;
    while offset < size {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).await?;
        if piece.is_empty() {
            bail!("the file became shorter while it was read");
        }
        let length = piece.len() as u64;
        client.upload_part(&image.id.to_string(), part, offset, piece.into()).await?;
        offset += length;
        eprintln!("{}: {} of {} uploaded", word(part), bytes(offset), bytes(size));
    }
    Ok(())
}

async fn volumes(client: &Client, output: Output, verb: ListShow) -> anyhow::Result<()> {
    match verb {
        ListShow::List => {
            let volumes = client.volumes().await?;
            show::print(output, &volumes, || {
                let mut table = Table::new(["NAME", "SIZE", "EPOCH", "MAP VERSION", "SOURCE NEEDED"]);
                for volume in &volumes {
                    table.row([
                        volume.name.to_string(),
                        bytes(volume.size_bytes),
                        volume.epoch.to_string(),
                        volume.map_version.to_string(),
                        if volume.needed_source.is_some() { "yes" } else { "no" }.into(),
                    ]);
                }
                table
            })
        }
        ListShow::Show { name } => show::print_one(output, &client.volume(&name).await?),
    }
}

async fn networks(client: &Client, output: Output, verb: NetworkVerb) -> anyhow::Result<()> {
    match verb {
        NetworkVerb::List => {
            let networks = client.networks().await?;
            show::print(output, &networks, || {
                let mut table = Table::new(["NAME", "PREFIX", "GATEWAY", "VNI", "MTU"]);
                for network in &networks {
                    table.row([
                        network.name.to_string(),
                        network.cidr.clone(),
                        network.gateway.to_string(),
                        network.vni.to_string(),
                        network.mtu.to_string(),
                    ]);
                }
                table
            })
        }
        NetworkVerb::Show { name } => show::print_one(output, &client.network(&name).await?),
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
            show::print(output, &operations, || operation_table(&operations))
        }
        OperationVerb::Show { id } => show::print_one(output, &client.operation(id.parse()?).await?),
        OperationVerb::Watch { id } => {
            let operation = client.operation(id.parse()?).await?;
            show::follow(client, output, operation, Watch { watch: true, no_watch: false }).await
        }
        OperationVerb::Cancel { id } => show::print_one(output, &client.cancel_operation(id.parse()?).await?),
    }
}

fn operation_table(operations: &[Operation]) -> Table {
    let mut table = Table::new(["ID", "KIND", "PHASE", "BY", "AT", "ERROR"]);
    for operation in operations {
        table.row([
            operation.id.to_string(),
            word(operation.kind),
            phase_name(operation.phase).into(),
            operation.actor.clone(),
            time(operation.created_at_ms),
            operation.error.as_ref().map_or_else(|| "-".into(), |problem| problem.detail.clone()),
        ]);
    }
    table
}

async fn events(client: &Client, output: Output, verb: EventVerb) -> anyhow::Result<()> {
    match verb {
        EventVerb::List { after } => {
            let events = all_events(client, after).await?;
            show::print(output, &events, || {
                let mut table = Table::new(["SEQ", "AT", "KIND", "ACTOR", "DATA"]);
                for event in &events {
                    table.row([
                        event.seq.to_string(),
                        time(event.at_ms),
                        event.kind.clone(),
                        event.actor.clone(),
                        event.data.to_string(),
                    ]);
                }
                table
            })
        }
        EventVerb::Watch { mut after } => loop {
            let mut stream = Box::pin(client.events(after).await?);
            while let Some(event) = stream.next().await {
                let Ok(event) = event else { break };
                after = event.seq;
                match output {
                    Output::Json | Output::Ndjson => println!("{}", serde_json::to_string(&event)?),
                    Output::Yaml => print!("---\n{}", supercloud_cli::yaml::render(&serde_json::to_value(&event)?)),
                    Output::Table => {
                        println!("{} {} {} {} {}", event.seq, time(event.at_ms), event.kind, event.actor, event.data);
                    }
                }
            }
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        },
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
            show::print(output, &markets, || {
                let mut table = Table::new(["MARKET", "PRICE/H", "ON DEMAND/H"]);
                for market in &markets {
                    let on_demand = market.on_demand_nanousd_per_hour.map_or_else(|| "-".into(), usd);
                    table.row([market.name.clone(), usd(market.price_nanousd_per_hour), on_demand]);
                }
                table
            })
        }
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
