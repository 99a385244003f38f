//! The import table of the design, checked: which crate may know which.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, path::Path};

/// Crate -> the crates of ours that it may import.
const TABLE: &[(&str, &[&str])] = &[
    ("supercloud-ids", &[]),
    ("supercloud-handover", &["ids"]),
    ("supercloud-api", &["ids", "handover"]),
    ("supercloud-blanket", &["ids", "api"]),
    ("supercloud-storage", &["ids", "api"]),
    ("supercloud-sdn", &["ids", "api"]),
    ("supercloud-scheduler", &["ids", "api"]),
    ("supercloud-feed", &["scheduler"]),
    ("supercloud-spotd", &["ids", "api", "scheduler", "feed"]),
    ("supercloud-kvm", &["ids", "blanket"]),
    ("supercloud-libvirt", &["ids", "api", "blanket"]),
    ("supercloud-xen", &["ids", "blanket"]),
    ("supercloud-vmm", &["blanket"]),
    ("supercloud-agent", &["ids", "api", "handover", "blanket", "storage", "sdn", "kvm", "libvirt", "xen"]),
    ("supercloud-store", &["ids", "api"]),
    ("supercloud-provider", &["api", "scheduler"]),
    ("supercloud-provider-ec2", &["api", "scheduler", "provider"]),
    ("supercloud-store-etcd", &["store"]),
    (
        "supercloud-controller",
        &[
            "ids",
            "api",
            "handover",
            "scheduler",
            "feed",
            "sdn",
            "storage",
            "store",
            "store-etcd",
            "provider",
            "provider-ec2",
        ],
    ),
    ("supercloud", &["ids", "api", "scheduler", "feed"]),
    ("supercloud-guest", &[]),
    ("supercloud-fuzz", &["api", "blanket", "storage", "sdn", "feed"]),
];

/// Pure crates: no runtime, files or clock among their dependencies.
const PURE: &[&str] = &["supercloud-ids", "supercloud-handover", "supercloud-scheduler", "supercloud-feed"];
const IMPURE: &[&str] = &["tokio", "reqwest", "sled", "libc", "rustix", "nix"];

/// `[dependencies]` of every member: name -> (all names, ours without the prefix).
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let read = |path: &Path| -> toml::Table { std::fs::read_to_string(path).unwrap().parse().unwrap() };
    let workspace = read(&root.join("Cargo.toml"));
    let members = workspace["workspace"]["members"].as_array().unwrap();
    members
        .iter()
        .map(|member| {
            let manifest = read(&root.join(member.as_str().unwrap()).join("Cargo.toml"));
            let name = manifest["package"]["name"].as_str().unwrap().to_owned();
            let names = manifest.get("dependencies").and_then(|d| d.as_table());
            (name, names.map(|names| names.keys().cloned().collect()).unwrap_or_default())
        })
        .collect()
}

#[test]
fn crates_know_only_what_the_table_lets_them() {
    let all = dependencies();
    for (name, names) in &all {
        // The lab and what lives beside it may know everything.
        if name.starts_with("supercloud-lab") {
            continue;
        }
        let Some((_, may)) = TABLE.iter().find(|(row, _)| row == name) else {
            panic!("{name} has no row in the import table");
        };
        for ours in names.iter().filter(|dependency| all.contains_key(*dependency)) {
            let short = ours.trim_start_matches("supercloud-");
            assert!(may.contains(&short), "{name} may not import {ours}");
        }
    }
}

#[test]
fn pure_crates_have_no_runtime_files_or_clock() {
    let all = dependencies();
    for name in PURE {
        for dependency in &all[*name] {
            assert!(!IMPURE.contains(&dependency.as_str()), "{name} is pure and may not import {dependency}");
        }
    }
}
