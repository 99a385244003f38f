//! Plans: shown with what they cost, made, applied, cancelled, taken back, followed.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use supercloud_api::{
    FleetPlan, FleetPlanCreate, PlanKind, PlanState, PlanStep, PlanStepState, client::Client, ids::PlanId,
};
use supercloud_cli::table::{Table, bytes, time, usd};

use crate::{
    arguments::{Output, PlanAim, PlanVerb, Watch},
    exit::PlanFailed,
    listings::word,
    show,
};

/// How often a plan that is followed is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A plan that is followed is given up after this: a day.
const WATCH_BUDGET: Duration = Duration::from_secs(86_400);

/// Runs a verb of plans.
pub async fn run(client: &Client, output: Output, verb: PlanVerb) -> anyhow::Result<()> {
    match verb {
        PlanVerb::List => {
            let plans = client.plans().await?;
            show::print(output, &plans, || list(&plans))
        }
        PlanVerb::Show { id } => print(output, &client.plan(id).await?),
        PlanVerb::Create(wanted) => {
            let (body, dry_run) = body(wanted.aim);
            let plan = client.create_plan(&body, dry_run).await?;
            print(output, &plan)?;
            if output.is_for_people() && !dry_run && !plan.steps.is_empty() {
                eprintln!("nothing has moved yet: supercloud plan apply {}", plan.id);
            }
            Ok(())
        }
        PlanVerb::Apply { id, trial, watch } => {
            let plan = client.apply_plan(id, trial.dry_run).await?;
            follow(client, output, plan, trial.dry_run, watch).await
        }
        PlanVerb::Cancel { id, watch } => {
            let plan = client.cancel_plan(id).await?;
            follow(client, output, plan, client.is_trying(), watch).await
        }
        PlanVerb::Undo { id, trial, watch } => {
            let plan = client.undo_plan(id, trial.dry_run).await?;
            follow(client, output, plan, trial.dry_run, watch).await
        }
        PlanVerb::Watch { id } => {
            let plan = client.plan(id).await?;
            follow(client, output, plan, false, Watch { watch: true, no_watch: false }).await
        }
    }
}

fn body(aim: PlanAim) -> (FleetPlanCreate, bool) {
    let empty = |kind| FleetPlanCreate {
        kind,
        host: None,
        cloud: None,
        guests: Vec::new(),
        to: None,
        band_percent: None,
        reason: None,
    };
    let (body, making) = match aim {
        PlanAim::Drain { host, making } => {
            (FleetPlanCreate { host: Some(host.into()), ..empty(PlanKind::Drain) }, making)
        }
        PlanAim::Evacuate { cloud, making } => {
            (FleetPlanCreate { cloud: Some(cloud.into()), ..empty(PlanKind::Evacuate) }, making)
        }
        PlanAim::Rebalance { band, making } => {
            (FleetPlanCreate { band_percent: band, ..empty(PlanKind::Rebalance) }, making)
        }
        PlanAim::Gather { guests, to, making } => {
            let guests = guests.into_iter().map(Into::into).collect();
            (FleetPlanCreate { guests, to: Some(to.into()), ..empty(PlanKind::Gather) }, making)
        }
    };
    (FleetPlanCreate { reason: making.reason, ..body }, making.dry_run)
}

fn list(plans: &[FleetPlan]) -> Table {
    let mut table =
        Table::new(["ID", "KIND", "STATE", "DONE", "STUCK", "MADE"]).and_wide(["BYTES", "EGRESS", "ACTOR", "REASON"]);
    for plan in plans {
        let cells = [
            plan.id.to_string(),
            word(plan.kind),
            word(plan.state),
            format!("{}/{}", done(plan), plan.steps.len()),
            plan.stuck.len().to_string(),
            time(plan.created_at_ms),
        ];
        let wide = [
            bytes(plan.cost.bytes),
            plan.cost.egress_nanousd.map_or_else(|| "-".into(), usd),
            plan.actor.clone(),
            plan.reason.clone().unwrap_or_else(|| "-".into()),
        ];
        table.row_wide(cells, wide);
    }
    table
}

fn done(plan: &FleetPlan) -> usize {
    plan.steps.iter().filter(|step| step.state == PlanStepState::Done).count()
}

fn seconds(ms: Option<u64>) -> String {
    ms.map_or_else(|| "-".into(), |ms| format!("{}.{} s", ms / 1000, ms % 1000 / 100))
}

fn steps(plan: &FleetPlan) -> Table {
    let mut table = Table::new(["GUEST", "FROM", "TO", "STATE", "BYTES", "TIME", "PAUSE", "EGRESS", "TROUBLE"])
        .and_wide(["WHY", "OPERATION", "UNDO"]);
    for step in &plan.steps {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let cells = [
            step.guest_name.to_string(),
            step.from_name.to_string(),
            step.to_name.to_string(),
            state_of(step),
            bytes(step.predicted_bytes),
            seconds(step.predicted_ms),
            step.predicted_downtime_ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms")),
            step.egress_nanousd.map_or_else(|| "-".into(), usd),
            or_dash(step.error.as_ref().map(|problem| problem.detail.clone())),
        ];
        let wide = [
            step.reason.clone(),
            or_dash(step.operation.map(|id| id.to_string())),
            or_dash(step.undo_operation.map(|id| id.to_string())),
        ];
        table.row_wide(cells, wide);
    }
    table
}

fn state_of(step: &PlanStep) -> String {
    let waits = if step.waiting_since_ms.is_some() { " (waits)" } else { "" };
    format!("{}{waits}", word(step.state))
}

fn print(output: Output, plan: &FleetPlan) -> anyhow::Result<()> {
    if !output.is_for_people() {
        return show::print_one(output, plan);
    }
    let cost = &plan.cost;
    println!("{} {}: {}", word(plan.kind), plan.id, word(plan.state));
    println!(
        "{} moves, {} at least, egress {}, time {}, longest pause {}",
        cost.moves,
        bytes(cost.bytes),
        cost.egress_nanousd.map_or_else(|| "not known".into(), usd),
        seconds(cost.predicted_ms),
        cost.longest_downtime_ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms")),
    );
    for cordon in &plan.cordons {
        println!("cordon of {}: {}", cordon.host_name, word(cordon.state));
    }
    for stuck in &plan.stuck {
        println!("stays: {} on {}: {}", stuck.guest_name, stuck.host_name, stuck.reason);
    }
    for risk in &plan.risks {
        println!("risk: {risk}");
    }
    if !plan.steps.is_empty() {
        let table = steps(plan);
        print!("{}", if output == Output::Wide { table.render_wide() } else { table.render() });
    }
    Ok(())
}

/// Follows a plan as asked for, and prints what came of it.
async fn follow(client: &Client, output: Output, plan: FleetPlan, is_trial: bool, watch: Watch) -> anyhow::Result<()> {
    let is_watched = watch.watch || (!watch.no_watch && std::io::stdout().is_terminal());
    if is_trial || !is_watched {
        return print(output, &plan);
    }
    let ended = watch_plan(client, plan.id).await?;
    print(output, &ended)?;
    if ended.state == PlanState::Failed { Err(PlanFailed(ended.id).into()) } else { Ok(()) }
}

/// Tells of each step that changes until the plan has come to rest.
async fn watch_plan(client: &Client, id: PlanId) -> anyhow::Result<FleetPlan> {
    let began = Instant::now();
    let mut told = Vec::new();
    loop {
        let plan = client.plan(id).await?;
        let states: Vec<String> = plan.steps.iter().map(state_of).collect();
        for (i, (step, state)) in plan.steps.iter().zip(&states).enumerate() {
            if told.get(i).is_some_and(|before| before != state) || (told.is_empty() && state != "pending") {
                eprintln!("{}: {} -> {}: {state}", step.guest_name, step.from_name, step.to_name);
            }
        }
        told = states;
        if plan.state.is_at_rest() || began.elapsed() > WATCH_BUDGET {
            return Ok(plan);
        }
        tokio::time::sleep(LOOK).await;
    }
}
