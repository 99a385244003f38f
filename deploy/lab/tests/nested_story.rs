//! The main job in hosts that are VMs of different hardware, with our own VMM: what `./deploy/demo --nested` shows.

mod told;

use std::collections::BTreeSet;

use supercloud_lab::require;

use told::Demo;

#[test]
fn the_story_in_hosts_that_are_vms_loses_nothing() {
    if !require::host_vms() {
        return;
    }
    let demo = Demo::new("nested");
    let output = demo.run(&["--nested"]);
    assert!(output.status.success(), "{}", output.status);
    let report = demo.report();
    let told: serde_json::Value = serde_json::from_slice(&std::fs::read(demo.json()).unwrap()).unwrap();
    assert_eq!(
        told["verdict"],
        serde_json::json!({"tcp_resets": 0, "bytes_corrupted": 0, "writes_lost": 0, "guest_restarts": 0})
    );
    let kinds: Vec<&str> = told["moves"].as_array().unwrap().iter().map(|row| row["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["live", "live", "live", "freeze", "thaw", "price", "price"]);
    // Live over each pair of hardware.
    let live = report.moves.iter().take(3);
    let pairs: BTreeSet<BTreeSet<&str>> =
        live.map(|row| BTreeSet::from([row.from.as_str(), row.to.as_str()])).collect();
    assert_eq!(pairs.len(), 3, "{pairs:?}");
    for checked in ["bytes", "writes", "ticks"] {
        assert!(told["checked"][checked].as_u64().unwrap() > 0, "{checked}");
    }
    demo.assert_gone();
}
