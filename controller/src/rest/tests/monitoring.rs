//! The alert rules and the board in `deploy/monitoring` name only what `/metrics` has.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Method;
use supercloud_api::{Role, unix_ms};

use super::{TestController, guest};

const RULES: &str = include_str!("../../../../deploy/monitoring/alerts.yml");
const BOARD: &str = include_str!("../../../../deploy/monitoring/grafana.json");

/// What a metric is asked for: its name and the label matchers behind it, `state="lost"`.
type Asked = (String, Vec<(String, String)>);

/// The metrics of ours that an expression names.
fn asked(expression: &str) -> Vec<Asked> {
    let mut found = Vec::new();
    for (at, _) in expression.match_indices("supercloud_") {
        let rest = &expression[at..];
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let (name, behind) = rest.split_at(end);
        let inner = behind.strip_prefix('{').and_then(|behind| behind.split_once('}')).map_or("", |(inner, _)| inner);
        let labels = inner.split(',').filter(|matcher| !matcher.is_empty()).map(|matcher| {
            let (label, value) = matcher.split_once('=').expect("a matcher has a sign");
            (label.trim().trim_end_matches('!').to_owned(), value.trim_start_matches('~').trim_matches('"').to_owned())
        });
        found.push((name.to_owned(), labels.collect()));
    }
    found
}

/// The labels that an expression groups by, or that a text shows: `by (le, route)`, `{{kind}}`, `{{ $labels.kind }}`.
fn shown_labels(text: &str) -> Vec<String> {
    let grouped =
        text.split("by (").skip(1).filter_map(|rest| rest.split_once(')')).flat_map(|(inner, _)| inner.split(','));
    let legends = text.split("{{").skip(1).filter_map(|rest| rest.split_once("}}")).map(|(inner, _)| inner);
    let labels = grouped.chain(legends).map(|label| label.trim().trim_start_matches("$labels."));
    labels.filter(|label| !label.starts_with("$value")).map(str::to_owned).collect()
}

fn rules() -> Vec<String> {
    RULES.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).map(str::to_owned).collect()
}

fn board() -> Vec<String> {
    let board: serde_json::Value = serde_json::from_str(BOARD).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    targets
        .map(|target| {
            format!("{} {}", target["expr"].as_str().expect("expr"), target["legendFormat"].as_str().expect("legend"))
        })
        .collect()
}

/// What is told: for each name the values of each label.
type Told = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

fn told(metrics: &str) -> Told {
    let mut told = Told::new();
    for line in metrics.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ").and_then(|line| line.split(' ').next()) {
            told.entry(name.to_owned()).or_default();
            continue;
        }
        let Some(series) = line.split(' ').next().filter(|_| !line.starts_with('#')) else { continue };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let known = told.entry(name.to_owned()).or_default();
        for label in labels.trim_end_matches('}').split("\",").filter(|label| !label.is_empty()) {
            let (label, value) = label.split_once("=\"").expect("label=\"value\"");
            known.entry(label.to_owned()).or_default().insert(value.trim_end_matches('"').to_owned());
        }
    }
    told
}

/// Metrics of which there are none as long as nothing is mirrored or kept, with their label.
const OF_SOME: [(&str, &str); 3] = [
    ("supercloud_mirror_behind_ms", "guest"),
    ("supercloud_lease_over_in_ms", "guest"),
    ("supercloud_checkpoint_age_ms", "volume"),
];

/// What an expression names that is not told.
fn wrong(expression: &str, told: &Told) -> Option<String> {
    let names = asked(expression);
    if names.is_empty() && !expression.starts_with("up{") {
        return Some("it names nothing of ours".into());
    }
    // Told only of guests that have a mirror or a lease, and of volumes that have checkpoints: the names are there, the labels then.
    let mut labels = BTreeSet::new();
    if OF_SOME.iter().any(|(metric, _)| names.iter().any(|(name, _)| name == metric)) {
        labels.extend(OF_SOME.iter().map(|(_, label)| (*label).to_owned()));
    }
    for (name, matchers) in names {
        let Some(known) = told.get(&name) else { return Some(format!("no metric {name}")) };
        labels.extend(known.keys().cloned());
        for (label, value) in matchers {
            let values = known.get(&label);
            if values.is_none() {
                return Some(format!("{name} has no label {label}"));
            }
            let is_known = |one: &str| match label.as_str() {
                "status" => one == "5..",
                _ => values.is_some_and(|values| values.contains(one)),
            };
            if !value.split('|').all(is_known) {
                return Some(format!("{name} has no {label} {value}, only {values:?}"));
            }
        }
    }
    shown_labels(expression).into_iter().find(|label| !labels.contains(label)).map(|label| format!("no label {label}"))
}

#[tokio::test]
async fn the_rules_and_the_board_of_monitoring_name_what_is_there() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let viewer = test.token("*", Role::Viewer).await.secret;
    let [east, west] = [world.hosts[0].id, world.hosts[1].id];
    let metrics = loop {
        test.parts().paths.told(east, vec![super::links::path(west)], unix_ms());
        let text = test.raw(Method::GET, "/metrics", Some(&viewer)).send().await.unwrap().text().await.unwrap();
        // The counts of operations and of requests, and who is to measure whom, may come a moment later.
        let awaited = ["operations_ended_total", "http_requests_total", "link_rtt_us"];
        if awaited.iter().all(|name| text.contains(&format!("supercloud_{name}{{"))) {
            break text;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let (rules, board) = (rules(), board());
    assert!(rules.len() >= 10 && board.len() >= 15, "{} rules, {} expressions", rules.len(), board.len());
    let told = told(&metrics);
    for expression in rules.iter().chain(&board) {
        assert_eq!(wrong(expression, &told), None, "{expression}");
    }
    test.stop().await;
}

/// What the rules do with series over time, by Prometheus' own tool.
#[test]
fn the_rules_of_monitoring_fire_when_they_shall_and_not_else() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring/tests");
    for arguments in [["check", "rules", "../alerts.yml"], ["test", "rules", "alerts.yml"]] {
        let ran = std::process::Command::new("promtool").args(arguments).current_dir(&folder).output();
        let ran = match ran {
            Ok(ran) => ran,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // Installed where all is run only: SUPERCLOUD_REQUIRE alone does not promise it.
                let is_needed = std::env::var_os("SUPERCLOUD_REQUIRE_ALL").is_some();
                assert!(!is_needed, "SUPERCLOUD_REQUIRE_ALL is set, but promtool is not installed");
                println!("skipped: needs promtool (apt-get install prometheus)");
                return;
            }
            Err(error) => panic!("promtool cannot be run: {error}"),
        };
        let said = [ran.stdout, ran.stderr].concat();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&said));
    }
}

/// Every rule has a test of how it behaves, or it says of a state that is there what it is.
#[test]
fn rules_that_look_at_a_stretch_of_time_are_tried() {
    const TESTS: &str = include_str!("../../../../deploy/monitoring/tests/alerts.yml");
    let mut missing = Vec::new();
    for rule in RULES.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap_or_default().trim();
        let looks_back = ["increase(", "_over_time(", "for: "].iter().any(|word| rule.contains(word));
        let is_tried = TESTS.contains(&format!("alertname: {name}\n"));
        if looks_back && !is_tried && !UNTRIED.contains(&name) {
            missing.push(name);
        }
    }
    assert!(missing.is_empty(), "no test in deploy/monitoring/tests: {}", missing.join(", "));
}

/// Rules of a stretch of time that are as plain as it gets: a threshold, held for some minutes.
const UNTRIED: [&str; 5] = [
    "SupercloudHostUnreachable",
    "SupercloudLinkSilent",
    "SupercloudMovePausesLong",
    "SupercloudStoreLarge",
    "SupercloudRestErrors",
];

#[test]
fn what_is_not_there_would_be_seen() {
    assert_eq!(
        asked("sum by (le) (rate(supercloud_a_bucket{state=\"x\",kind=~\"y|z\"}[1h])) > supercloud_b"),
        [
            ("supercloud_a_bucket".into(), vec![("state".into(), "x".into()), ("kind".into(), "y|z".into())]),
            ("supercloud_b".into(), vec![])
        ]
    );
    assert_eq!(
        shown_labels("sum by (le, route) (x) {{kind}}: {{ $labels.phase }} {{ $value | humanize }}"),
        ["le", "route", "kind", "phase"]
    );
    let told = told("# TYPE supercloud_a gauge\nsupercloud_a{state=\"up\",route=\"/v1/a,b\"} 1\nsupercloud_b 2\n");
    assert_eq!(told["supercloud_a"]["state"], BTreeSet::from(["up".to_owned()]));
    assert!(told["supercloud_b"].is_empty() && !told.contains_key("supercloud_c"));
    for good in ["supercloud_a", "supercloud_a{state=\"up\"}", "sum by (route) (supercloud_a)", "up{job=\"x\"} == 0"] {
        assert_eq!(wrong(good, &told), None, "{good}");
    }
    let bad = [
        "supercloud_c",
        "supercloud_a_total",
        "supercloud_a{state=\"down\"}",
        "supercloud_a{stat=\"up\"}",
        "sum by (cloud) (supercloud_a)",
        "supercloud_b {{state}}",
        "node_load1",
    ];
    for bad in bad {
        assert!(wrong(bad, &told).is_some(), "{bad}");
    }
}
