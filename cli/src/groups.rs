//! `supercloud group …`

use reqwest::Method;
use supercloud_api::{GroupCreate, GroupThaw, GroupUpdate, GuestFreeze, GuestMigrate, client::Client};
use supercloud_cli::fields::Names;

use crate::{
    arguments::{GroupVerb, Output},
    guests::rehearse,
    listings, names, show,
};

/// Runs a verb.
pub async fn run(client: &Client, output: Output, verb: GroupVerb) -> anyhow::Result<()> {
    let refs = |guests: Vec<String>| guests.into_iter().map(Into::into).collect();
    match verb {
        GroupVerb::List => {
            let groups = client.groups().await?;
            let names = match output.is_for_people() {
                true => names::of_ids_in(client, &serde_json::to_value(&groups)?).await,
                false => Names::new(),
            };
            show::print(output, &groups, || listings::groups(&groups, &names))
        }
        GroupVerb::Show { name } => show::print_named(client, output, &client.group(&name).await?).await,
        GroupVerb::Create { name, guests } => {
            let body = GroupCreate { name: name.parse()?, project: None, guests: refs(guests) };
            show::print_one(output, &client.create_group(&body).await?)
        }
        GroupVerb::Set { name, guests } => {
            let body = GroupUpdate { guests: refs(guests) };
            show::print_one(output, &client.patch_group(&name, &body).await?)
        }
        GroupVerb::Delete { name } => Ok(client.delete_group(&name).await?),
        GroupVerb::Migrate {
            name,
            to,
            bandwidth_mbps,
            max_downtime_ms,
            deadline,
            no_auto_converge,
            memory,
            reason,
            trial,
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
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/groups/{name}/migrate"), &body).await;
            }
            show::follow(client, output, client.migrate_group(&name, &body).await?, watch).await
        }
        GroupVerb::Freeze { name, reason, trial, watch } => {
            let body = GuestFreeze { reason };
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/groups/{name}/freeze"), &body).await;
            }
            show::follow(client, output, client.freeze_group(&name, &body).await?, watch).await
        }
        GroupVerb::Thaw { name, to, memory, reason, trial, watch } => {
            let body = GroupThaw { to: to.map(Into::into), memory: memory.map(Into::into), reason };
            if trial.dry_run {
                return rehearse(client, output, Method::POST, &format!("/v1/groups/{name}/thaw"), &body).await;
            }
            show::follow(client, output, client.thaw_group(&name, &body).await?, watch).await
        }
    }
}
