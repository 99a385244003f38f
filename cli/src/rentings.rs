//! Renting hosts and giving them back.

use std::time::Duration;

use anyhow::{Context as _, bail};
use supercloud_api::{HostRent, Operation, Renting, RentingState, Tenure, client::Client};
use supercloud_cli::table::{Table, time, usd};
use supercloud_scheduler::money::NanoUsd;

use crate::{
    arguments::{HostVerb, Output},
    listings::word,
    show,
};

/// How long an own machine's reservation is waited for: it needs no provider.
const RESERVE_BUDGET: Duration = Duration::from_secs(30);

/// Runs a verb of rented hosts.
pub async fn run(client: &Client, output: Output, verb: HostVerb) -> anyhow::Result<()> {
    match verb {
        HostVerb::Rent { name, cloud, instance_type, spot, max_price, dry_run, watch } => {
            let max_price = max_price.as_deref().map(NanoUsd::parse_usd).transpose();
            let body = HostRent {
                host_name: name.parse()?,
                instance_type,
                tenure: if spot { Tenure::Spot } else { Tenure::OnDemand },
                max_price_nanousd_per_hour: max_price.map_err(anyhow::Error::msg).context("--max-price")?.map(|p| p.0),
            };
            if dry_run {
                return show::print_one(output, &client.plan_rent(&cloud, &body).await?);
            }
            let operation = client.rent_host(&cloud, &body).await?;
            match reserved(client, &operation).await? {
                Some(renting) => print_token(client, output, &renting).await,
                None => show::follow(client, output, operation, watch).await,
            }
        }
        HostVerb::Return { name, force, watch } => {
            let renting = find(client, &name).await?;
            let operation = client.return_renting(renting.id, force).await?;
            show::follow(client, output, operation, watch).await
        }
        HostVerb::Rentings { all } => {
            let mut rentings = client.rentings().await?;
            rentings.retain(|renting| all || renting.state != RentingState::Ended);
            show::print(output, &rentings, || table(&rentings))
        }
        _ => unreachable!("run by things"),
    }
}

fn table(rentings: &[Renting]) -> Table {
    let mut table = Table::new(["HOST", "CLOUD", "TYPE", "TENURE", "STATE", "INSTANCE", "SINCE", "TROUBLE"])
        .and_wide(["ID", "HOST ID", "PROVIDER", "ADDRESS", "AT MOST/H", "LAUNCHED", "UP", "ENDED"]);
    for renting in rentings {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let cells = [
            renting.host_name.to_string(),
            renting.cloud_name.to_string(),
            renting.instance_type.clone(),
            word(renting.tenure),
            renting.end.map_or_else(|| word(renting.state), |end| format!("{} ({})", word(renting.state), word(end))),
            renting.instance.clone().unwrap_or_else(|| "-".into()),
            time(renting.created_at_ms),
            renting.error.as_ref().map_or_else(|| "-".into(), |problem| problem.detail.clone()),
        ];
        let wide = [
            renting.id.to_string(),
            renting.host.to_string(),
            renting.provider.clone(),
            or_dash(renting.address.clone()),
            or_dash(renting.max_price_nanousd_per_hour.map(usd)),
            or_dash(renting.launched_at_ms.map(time)),
            or_dash(renting.up_at_ms.map(time)),
            or_dash(renting.ended_at_ms.map(time)),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// The renting of a host's name or id, or of its own id: the one that has not ended, of several.
async fn find(client: &Client, name: &str) -> anyhow::Result<Renting> {
    if let Ok(id) = name.parse() {
        return Ok(client.renting(id).await?);
    }
    let rentings = client.rentings().await?;
    let is_meant = |renting: &&Renting| renting.host_name.as_str() == name || renting.host.to_string() == name;
    match rentings.iter().rev().find(|renting| is_meant(renting) && renting.state != RentingState::Ended) {
        Some(renting) => Ok(renting.clone()),
        None => bail!("no host '{name}' is rented; `supercloud host remove` removes one that joined by itself"),
    }
}

/// The renting, if it is a reserved machine that waits for somebody to start its agent. `None`: a provider launches it, or it
/// ended.
async fn reserved(client: &Client, operation: &Operation) -> anyhow::Result<Option<Renting>> {
    let began = std::time::Instant::now();
    loop {
        let renting = client.rentings().await?.into_iter().find(|one| one.rent_operation == operation.id);
        let renting = renting.context("the controller does not know the renting that it accepted")?;
        match renting.state {
            RentingState::Launched if renting.is_started_by_hand => return Ok(Some(renting)),
            RentingState::Recorded | RentingState::Asked if began.elapsed() < RESERVE_BUDGET => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            _ => return Ok(None),
        }
    }
}

async fn print_token(client: &Client, output: Output, renting: &Renting) -> anyhow::Result<()> {
    let token = client.renting_join_token(renting.id).await?;
    match output {
        Output::Table | Output::Wide => {
            let address = renting.address.as_deref().unwrap_or("the machine");
            eprintln!("{address} is reserved; start the agent there with this token (works for 15 minutes):");
            println!("{}", token.token);
            Ok(())
        }
        _ => show::print_one(output, &token),
    }
}
