//! `supercloud guest …`

use anyhow::Context as _;
use reqwest::Method;
use supercloud_api::{
    GuestCreate, GuestFailover, GuestFreeze, GuestMigrate, GuestMirror, GuestPatch, GuestStart, GuestStop, GuestThaw,
    MirrorMode, Operation, Placement, Propagation, Shape, client::Client,
};
use supercloud_cli::{
    fields::Names,
    table::{Table, bytes, duration},
};

use crate::{
    arguments::{GuestCreateArguments, GuestVerb, Output},
    console, goodness, histories, listings, mirrors, names, show,
};

/// Runs a verb.
pub async fn run(client: &Client, output: Output, verb: GuestVerb) -> anyhow::Result<()> {
    match verb {
        GuestVerb::List => list(client, output).await,
        GuestVerb::Show { name } => show::print_named(client, output, &client.guest(&name).await?).await,
        GuestVerb::Placement { name, place } => {
            let found = match place {
                Some(place) => client.explain_placement_at(&name, &place).await?,
                None => client.explain_placement(&name).await?,
            };
            print_placement(output, &found)
        }
        GuestVerb::Console { name, read_only } => console::run(client, &name, read_only).await,
        GuestVerb::Create(arguments) => create(client, output, arguments).await,
        GuestVerb::Start { name, place, cpu, trial, watch } => {
            let body = GuestStart { place: place.map(Into::into), cpu };
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/guests/{name}/start"), &body).await;
            }
            show::follow(client, output, client.start_guest(&name, &body).await?, watch).await
        }
        GuestVerb::Stop { name, force, trial, watch } => {
            let body = GuestStop { force, grace_ms: None };
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/guests/{name}/stop"), &body).await;
            }
            show::follow(client, output, client.stop_guest(&name, &body).await?, watch).await
        }
        GuestVerb::Migrate {
            name,
            to,
            bandwidth_mbps,
            max_downtime_ms,
            deadline,
            no_auto_converge,
            memory,
            dry_run,
            reason,
            watch,
        } => {
            let body = GuestMigrate {
                to: to.into(),
                bandwidth_bps: bandwidth_mbps.map(|mbps| mbps.saturating_mul(1_000_000)),
                max_downtime_ms,
                auto_converge: !no_auto_converge,
                deadline_ms: deadline.map(|seconds| seconds.saturating_mul(1000)),
                memory: memory.into(),
                reason,
            };
            if dry_run {
                return print_plan(output, &client.plan_migration(&name, &body).await?);
            }
            let operation = client.migrate_guest(&name, &body).await?;
            show::follow(client, output, operation, watch).await
        }
        GuestVerb::Mirror {
            name,
            to,
            interval_ms,
            strict,
            fencing,
            lease_ms,
            keep,
            bandwidth_mbps,
            dry_run,
            reason,
            no_wait,
        } => {
            let body = GuestMirror {
                to: to.into(),
                interval_ms,
                mode: if strict { MirrorMode::Strict } else { MirrorMode::Async },
                bandwidth_bps: bandwidth_mbps.map(|mbps| mbps.saturating_mul(1_000_000)),
                fencing: fencing.into(),
                lease_ms,
                keep,
                reason,
            };
            if dry_run {
                return print_plan(output, &client.plan_mirror(&name, &body).await?);
            }
            mirrors::begin(client, output, &name, &body, !no_wait).await
        }
        GuestVerb::Mirrors { name } => mirrors::list(client, output, &name).await,
        GuestVerb::Unmirror { name, trial } => {
            if trial.dry_run {
                return rehearse(client, output, Method::DELETE, &format!("/v1/guests/{name}/mirrors"), &()).await;
            }
            show::print_named(client, output, &client.end_mirrors(&name).await?).await
        }
        GuestVerb::Failover { name, host_is_dead, reason, watch } => {
            let operation = client.fail_over_guest(&name, &GuestFailover { host_is_dead, reason }).await?;
            show::follow(client, output, operation, watch).await
        }
        GuestVerb::Freeze { name, trial, watch } => {
            let body = GuestFreeze::default();
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/guests/{name}/freeze"), &body).await;
            }
            show::follow(client, output, client.freeze_guest(&name, &body).await?, watch).await
        }
        GuestVerb::Checkpoint { name } => {
            let history = client.checkpoint_guest(&name).await?;
            if client.is_trying() {
                return show::print(output, &history, || histories::table(&history));
            }
            eprintln!("checkpoint {} is being taken; `supercloud volume history {name}` shows it", history.next);
            show::print(output, &history, || histories::table(&history))
        }
        GuestVerb::Thaw { name, to, checkpoint, memory, trial, watch } => {
            let body = GuestThaw {
                to: to.map(Into::into),
                freeze: None,
                checkpoint: checkpoint.is_some(),
                point: checkpoint.flatten(),
                memory: memory.map(Into::into),
            };
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/guests/{name}/thaw"), &body).await;
            }
            show::follow(client, output, client.thaw_guest(&name, &body).await?, watch).await
        }
        GuestVerb::Evacuations => {
            let evacuations = client.evacuations().await?;
            let names = names::of_ids_in(client, &serde_json::to_value(&evacuations)?).await;
            show::print(output, &evacuations, || listings::evacuations(&evacuations, &names))
        }
        GuestVerb::Reliability { name, days } => goodness::reliability(client, output, name.as_deref(), days).await,
        GuestVerb::FollowPrices { name, follow } => {
            let body = GuestPatch { follow_prices: Some(follow), ..GuestPatch::default() };
            show::print_one(output, &client.patch_guest(&name, &body).await?)
        }
        GuestVerb::OnLoss { name, what } => {
            let body = GuestPatch { on_loss: Some(what), ..GuestPatch::default() };
            show::print_one(output, &client.patch_guest(&name, &body).await?)
        }
        GuestVerb::Delete { name, trial, watch } => {
            if trial.dry_run {
                return rehearse(client, output, Method::DELETE, &format!("/v1/guests/{name}"), &()).await;
            }
            let operation = client.delete_guest(&name).await?;
            show::follow(client, output, operation, watch).await
        }
    }
}

/// Asks what a call would do, and prints what was found.
pub async fn rehearse<B: serde::Serialize + Sync>(
    client: &Client,
    output: Output,
    method: Method,
    path: &str,
    body: &B,
) -> anyhow::Result<()> {
    let found: Operation = client.call(method, &format!("{path}?dry_run=true"), body).await?;
    if !output.is_for_people() {
        return show::print_one(output, &found);
    }
    if found.plan.as_ref().is_some_and(|plan| !plan.checks.is_empty()) {
        return print_plan(output, &found);
    }
    println!("it can be done now");
    Ok(())
}

async fn list(client: &Client, output: Output) -> anyhow::Result<()> {
    let guests = client.guests().await?;
    let names = match output {
        Output::Wide => names::of_ids_in(client, &serde_json::to_value(&guests)?).await,
        _ => Names::new(),
    };
    show::print(output, &guests, || listings::guests(&guests, &names))
}

async fn create(client: &Client, output: Output, arguments: GuestCreateArguments) -> anyhow::Result<()> {
    let user_data = match &arguments.cloud_init {
        Some(path) => Some(std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?),
        None => None,
    };
    let body = GuestCreate {
        name: arguments.name.parse()?,
        project: None,
        image: arguments.image.into(),
        shape: arguments
            .shape
            .unwrap_or(Shape { vcpus: arguments.vcpus, memory_bytes: arguments.memory.saturating_mul(1 << 20) }),
        disk_from: None,
        network: arguments.network.into(),
        ipv4: arguments.ipv4,
        place: arguments.place.map(Into::into),
        disk_bytes: arguments.disk.map(|gib| gib.saturating_mul(1 << 30)),
        user_data,
        cmdline_extra: arguments.cmdline_extra,
        propagation: Propagation::default(),
        follow_prices: arguments.follow_prices,
        cpu: arguments.cpu,
        on_loss: arguments.on_loss,
        start: !arguments.no_start,
    };
    if arguments.trial.dry_run {
        return rehearse(client, output, Method::POST, "/v1/guests", &body).await;
    }
    let operation = client.create_guest(&body).await?;
    show::follow(client, output, operation, arguments.watch).await
}

fn print_placement(output: Output, found: &Placement) -> anyhow::Result<()> {
    if !output.is_for_people() {
        return show::print_one(output, found);
    }
    let mut table = Table::new(["HOST", "CLOUD", "TAKES_IT", "RANK", "FREE_MEMORY", "FOUND"]);
    for host in &found.hosts {
        table.row([
            host.host_name.to_string(),
            host.cloud_name.to_string(),
            if host.is_ok { "yes" } else { "NO" }.into(),
            host.score.map_or_else(|| "-".into(), |score| score.rank.to_string()),
            host.score.map_or_else(|| "-".into(), |score| bytes(score.free_memory_bytes)),
            host.detail.clone(),
        ]);
    }
    print!("{}", table.render());
    let name = found.destination_name.as_ref().map_or_else(|| "nowhere".into(), ToString::to_string);
    println!("would go to {name}; best is: {}", found.objective);
    if !found.cpus.is_empty() {
        let mut table = Table::new(["CPU", "GIVEN", "LIVE_TO", "CLOUDS", "MARKETS", "WITHOUT"]);
        for cpu in &found.cpus {
            table.row([
                format!("{}{}", cpu.choice, if cpu.is_current { " *" } else { "" }),
                cpu.baseline.clone(),
                format!("{} hosts", cpu.hosts),
                cpu.clouds.to_string(),
                cpu.markets.to_string(),
                if cpu.without.is_empty() { "-".to_owned() } else { cpu.without.join(",") },
            ]);
        }
        println!();
        print!("{}", table.render());
        println!("* what it has asked for; another from its next start on: supercloud guest start NAME --cpu CPU");
    }
    Ok(())
}

fn print_plan(output: Output, operation: &Operation) -> anyhow::Result<()> {
    let Some(plan) = operation.plan.as_ref().filter(|_| output.is_for_people()) else {
        return show::print_one(output, operation);
    };
    let mut table = Table::new(["CHECK", "OK", "FOUND"]);
    for check in &plan.checks {
        table.row([check.name.clone(), if check.is_ok { "yes" } else { "NO" }.into(), check.detail.clone()]);
    }
    print!("{}", table.render());
    let Some(name) = &plan.destination_name else {
        // The guests of a group may go to several hosts: the checks name them.
        if operation.group.is_some() && plan.checks.iter().all(|check| check.is_ok) {
            println!("all of it can be done now");
            return Ok(());
        }
        println!("would not be done");
        return Ok(());
    };
    let expected = match (plan.predicted_bytes, plan.predicted_ms) {
        (Some(count), Some(ms)) => format!("; expected {} in {}", bytes(count), duration(ms)),
        (Some(count), None) => {
            format!(
                "; expected {}; how long depends on the link, whose rate is not known (with --bandwidth-mbps it is told)",
                bytes(count)
            )
        }
        _ => String::new(),
    };
    let pause = plan.predicted_downtime_ms.map(|ms| format!(", standing still for {}", duration(ms)));
    println!("would go to {name}{expected}{}", pause.unwrap_or_default());
    if let Some(basis) = &plan.predicted_from {
        println!("({basis})");
    }
    Ok(())
}
