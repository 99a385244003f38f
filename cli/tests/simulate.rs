//! `supercloud simulate`, as a person calls it. The recorded traces are not part of the product: their tests look for them in
//! the folder that SUPERCLOUD_TRACES names.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Standard output, or the standard error of a call that failed.
fn simulate(arguments: &[&str]) -> Result<String, String> {
    let called = Command::new(env!("CARGO_BIN_EXE_supercloud")).arg("simulate").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if called.status.success() { Ok(text(called.stdout)) } else { Err(text(called.stderr)) }
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&simulate(&[arguments, &["-o", "json"]].concat()).unwrap()).unwrap()
}

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn the_sample_is_replayed_the_same_each_time_and_its_ledger_adds_up() {
    let ledger = scratch("ledger").join("ledger.csv");
    let arguments = ["--trace", "sample", "--policy", "smart-spot", "--ledger", ledger.to_str().unwrap()];
    let report = json(&arguments);
    assert_eq!(report, json(&arguments));
    assert_eq!(report["about"]["is_generated"], true);
    let smart = &report["policies"]["smart-spot"];
    assert!(smart["availability"].is_null(), "no interruptions are modelled, so none is claimed");
    let cost = |value: &Value| value["cost_nanousd"].as_u64().unwrap();
    let (paid, listed) = (cost(smart), cost(&report["baselines"]["on_demand"]));
    assert!(cost(&report["optimum"]) <= paid && paid < listed);
    let packed = |key: &str| report["on_demand_packed"][key].as_f64().unwrap();
    assert!(packed("lower_bound_usd") <= packed("cost_usd") && packed("cost_usd") <= listed as f64 / 1e9);
    assert!((1.0..56.0).contains(&packed("hosts")), "56 guests on fewer hosts");
    let text = std::fs::read_to_string(ledger).unwrap();
    let sum: u64 = text.lines().skip(1).map(|line| line.rsplit_once(',').unwrap().1.parse::<u64>().unwrap()).sum();
    assert_eq!(sum, paid);
    let months = smart["months"].as_array().unwrap();
    let sum: f64 = months.iter().map(|month| month["cost_usd"].as_f64().unwrap()).sum();
    assert!((sum - paid as f64 / 1e9).abs() < 1e-6);
}

#[test]
fn policies_and_fleets_of_ones_own_are_read() {
    let folder = scratch("own");
    let (policy, fleet) = (folder.join("p.toml"), folder.join("f.toml"));
    std::fs::write(&policy, "kind = 'cheapest'\nname = 'mine'\nsettle_ms = 0\n").unwrap();
    std::fs::write(
        &fleet,
        "[[guests]]\nname = 'one'\ncount = 3\nvcpus = 1\nmemory_mib = 1024\ndirty_mib_per_s = 1\nworking_set_mib = 64\n\
         volume_dirty_mib = 0\nlink_mbit_per_s = 1000\n",
    )
    .unwrap();
    let (policy, fleet) = (policy.to_str().unwrap(), fleet.to_str().unwrap());
    let report = json(&["--trace", "sample", "--policy", policy, "--fleet", fleet, "--no-optimum"]);
    assert_eq!(report["about"]["guests"], 3);
    assert!(report["policies"]["mine"]["cost_usd"].as_f64().unwrap() > 0.0);
    assert!(report["optimum"].is_null());
    let table = simulate(&["--trace", "sample", "--policy", policy, "--fleet", fleet]).unwrap();
    for word in ["mine", "on-demand", "offline optimum", "not measured"] {
        assert!(table.contains(word), "{word} in\n{table}");
    }
}

#[test]
fn a_guest_follows_its_clients_over_three_regions() {
    let report = json(&["--sun", "--days", "2"]);
    assert_eq!(report, json(&["--sun", "--days", "2"]));
    let of = |name: &str, key: &str| report["policies"][name][key].as_f64().unwrap();
    assert!(of("follow-the-sun", "p95_ms") <= 0.7 * of("fixed-in-americas", "p95_ms"), "{report}");
    assert!(of("follow-the-sun", "moves_usd") > 0.0 && of("fixed-in-asia", "moves") == 0.0);
    let good_enough = json(&["--sun", "--target-p95", "235"]);
    assert_eq!(good_enough["policies"]["follow-the-sun"]["moves"], 0, "nothing is moved for what is not asked for");
    assert!(simulate(&["--sun"]).unwrap().contains("VS_BEST_FIXED"));
}

#[test]
fn jobs_with_deadlines_are_replayed_on_recorded_capacity() {
    let path = scratch("jobs").join("capacity.csv");
    let mut text = "trace,zone,resource,gap_seconds,start_offset_seconds,instances_available\n".to_owned();
    // Two hours there, one away, for a hundred hours.
    for step in 0..67_u32 {
        text.push_str(&format!("t,z,gpu,60,{},{}\n", step / 2 * 10_800 + step % 2 * 7200, 1 - step % 2));
    }
    text.push_str("t,z,gpu,60,363600,end\n");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let jobs = ["--work-hours", "8", "--deadline-hours", "12", "--capacity", path];
    let report = json(&jobs);
    let share = |name: &str| report["policies"][name]["vs_optimum"].as_f64().unwrap();
    assert!(1.0 <= share("deadline") && share("deadline") < share("uniform-progress"), "{report}");
    assert!(share("uniform-progress") < share("on-demand"));
    for name in ["deadline", "uniform-progress", "latest-start", "on-demand"] {
        assert_eq!(report["policies"][name]["missed_deadlines"], 0, "{name}");
    }
    assert!(simulate(&jobs).unwrap().contains("offline optimum"));
    for (wrong, what) in [
        (vec!["--work-hours", "8"], "deadline-hours"),
        (vec!["--work-hours", "12", "--deadline-hours", "12", "--capacity", path], "do not fit"),
        (vec!["--work-hours", "8", "--deadline-hours", "400", "--capacity", path], "too long"),
        (vec!["--work-hours", "8", "--deadline-hours", "200", "--capacity", path], "no recording"),
        (vec!["--seed", "1"], "--trace"),
    ] {
        let error = simulate(&wrong).unwrap_err();
        assert!(error.contains(what), "{wrong:?}: {error}");
    }
}

#[test]
fn what_is_wrong_is_said_with_file_and_line() {
    let folder = scratch("wrong");
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let prices =
        write("prices.csv", "timestamp_utc,zone,instance_type,usd_per_hour\n2021-03-02T01:47:23Z,a,m9.huge,1\n");
    let policy = write("policy.toml", "kind = 'smart-spot'\nhorizn_ms = 5\n");
    let range = write("range.toml", "kind = 'smart-spot'\nhorizon_ms = 0\n");
    let fleet = write("fleet.toml", "guests = []\n");
    for (arguments, expected) in [
        (vec!["--trace", &prices], "line 2: m9.huge is not in the catalogue"),
        (vec!["--trace", "/nowhere.csv"], "reading /nowhere.csv"),
        (vec!["--trace", "sample", "--policy", "clever"], "there is no policy 'clever'"),
        (vec!["--trace", "sample", "--policy", &policy], "horizn_ms"),
        (vec!["--trace", "sample", "--policy", &range], "horizon_ms is 0"),
        (vec!["--trace", "sample", "--fleet", &fleet], "0 guests"),
        (vec!["--trace", "sample", "--tick", "420"], "does not divide an hour"),
        (vec!["--trace", "sample", "--capacity", &prices], "line 1 must be"),
        (vec!["--trace", "sample", "--interruptions", "recorded"], "needs the recordings: --capacity FILE"),
        (vec!["--sun", "--trace", "sample"], "cannot be used with"),
        (vec!["--trace", "sample", "--days", "3"], "are for --sun"),
    ] {
        let said = simulate(&arguments).unwrap_err();
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    let help = simulate(&["--help"]).unwrap();
    assert!(help.contains("supercloud simulate --trace sample"), "{help}");
}

/// The public traces, where they are.
fn traces() -> Option<PathBuf> {
    let folder = std::env::var_os("SUPERCLOUD_TRACES").map(PathBuf::from).filter(|folder| folder.is_dir());
    if folder.is_none() {
        println!("skipped: no traces");
    }
    folder
}

#[test]
fn on_the_recorded_auctions_money_is_near_the_optimum_and_no_guest_is_lost() {
    let Some(folder) = traces() else { return };
    let trace = folder.join("prices-2015-us-east-1.csv.gz");
    let report = json(&["--trace", trace.to_str().unwrap(), "--part", "second", "--policy", "smart-spot"]);
    let smart = &report["policies"]["smart-spot"];
    let cost = |value: &Value| value["cost_usd"].as_f64().unwrap();
    assert!(cost(smart) <= 1.10 * cost(&report["optimum"]), "{} {}", smart["cost_usd"], report["optimum"]);
    assert_eq!(smart["missed_deadlines"], 0);
    assert!(smart["availability"].as_f64().unwrap() >= 0.999_99);
    for month in smart["months"].as_array().unwrap() {
        assert!(month["cost_usd"].as_f64() <= month["on_demand_usd"].as_f64(), "{month}");
    }
}

#[test]
fn on_todays_markets_with_recorded_capacity_no_guest_is_lost() {
    let Some(folder) = traces() else { return };
    let (trace, capacity) = (folder.join("prices-2021-us-east-1.csv.gz"), folder.join("capacity.csv"));
    let (trace, capacity) = (trace.to_str().unwrap(), capacity.to_str().unwrap());
    for (notice, policy, dearest, least) in [
        ("120", "smart-spot", 1.15, 0.999_99),
        ("30", "smart-spot", 1.15, 0.999_6),
        ("30", "smart-spot-spares", 1.75, 0.999_85),
    ] {
        let part = ["--part", "second", "--notice", notice, "--policy", policy];
        let report = json(&[&["--trace", trace, "--capacity", capacity][..], &part].concat());
        let (smart, cost) = (&report["policies"][policy], |value: &Value| value["cost_usd"].as_f64().unwrap());
        assert!(smart["interruptions"].as_u64().unwrap() > 1000 && smart["missed_deadlines"] == 0, "{notice} s");
        assert!(cost(smart) <= dearest * cost(&report["optimum"]), "{notice} s {policy}: {}", smart["cost_usd"]);
        assert!(smart["availability"].as_f64().unwrap() >= least, "{notice} s {policy}: {}", smart["availability"]);
        for month in smart["months"].as_array().unwrap() {
            assert!(month["cost_usd"].as_f64() < month["on_demand_usd"].as_f64(), "{month}");
        }
    }
}
