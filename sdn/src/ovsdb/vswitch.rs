//! Idempotent operations on bridges, ports and interfaces.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout_at},
};

use super::{OvsdbClient, OvsdbError};

const DATABASE: &str = "Open_vSwitch";
/// How often a change of the switch is looked for while waiting.
const POLL: Duration = Duration::from_millis(20);

/// A bridge as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Its name.
    pub name: String,
    /// `netdev` (userspace) or `system` (kernel).
    pub datapath_type: String,
    /// `secure` or `standalone`.
    pub fail_mode: String,
    /// OpenFlow versions.
    pub protocols: Vec<String>,
    /// Settings that it must have; others stay.
    pub other_config: BTreeMap<String, String>,
}

/// An interface, which is the only one of its port, as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InterfaceSpec {
    /// Its name, and its port's.
    pub name: String,
    /// The type: empty for a device of the system, `internal`, `vxlan`.
    pub kind: String,
    /// Options of the type; others are removed.
    pub options: BTreeMap<String, String>,
    /// The wanted switch port.
    pub ofport_request: Option<u32>,
    /// The wanted Ethernet address (internal ones only).
    pub mac: Option<String>,
    /// The wanted MTU in bytes.
    pub mtu_request: Option<u16>,
    /// Marks that it must have; others stay.
    pub external_ids: BTreeMap<String, String>,
}

/// An interface as the database shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: String,
    /// Options of the type.
    pub options: BTreeMap<String, String>,
    /// The switch port, once there is one.
    pub ofport: Option<u32>,
    /// The switch port that was asked for.
    pub ofport_request: Option<u32>,
    /// Marks.
    pub external_ids: BTreeMap<String, String>,
    /// Why it does not work.
    pub error: Option<String>,
}

/// The `Open_vSwitch` database. Connects anew when the connection has ended.
#[derive(Debug)]
pub struct Vswitch {
    path: PathBuf,
    deadline: Duration,
    client: Mutex<Option<OvsdbClient>>,
}

fn map(entries: &BTreeMap<String, String>) -> Value {
    json!(["map", entries.iter().map(|(k, v)| json!([k, v])).collect::<Vec<_>>()])
}

fn set<T: Into<Value>>(value: Option<T>) -> Value {
    value.map_or_else(|| json!(["set", []]), Into::into)
}

fn read_map(value: &Value) -> BTreeMap<String, String> {
    let pairs = value.get(1).and_then(Value::as_array);
    pairs
        .into_iter()
        .flatten()
        .filter_map(|pair| Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned())))
        .collect()
}

/// The elements of a set, which is written bare when it has one.
fn read_set(value: &Value) -> Vec<&Value> {
    match value.as_array() {
        Some(pair) if pair.first().and_then(Value::as_str) == Some("set") => {
            pair.get(1).and_then(Value::as_array).map(|v| v.iter().collect()).unwrap_or_default()
        }
        _ => vec![value],
    }
}

fn read_port(value: &Value) -> Option<u32> {
    read_set(value).first().and_then(|v| v.as_i64()).filter(|n| *n > 0).and_then(|n| u32::try_from(n).ok())
}

fn by_name(name: &str) -> Value {
    json!([["name", "==", name]])
}

fn settle(operations: &mut Vec<Value>) {
    operations.push(json!({"op": "mutate", "table": DATABASE, "where": [], "mutations": [["next_cfg", "+=", 1]]}));
    operations.push(json!({"op": "select", "table": DATABASE, "where": [], "columns": ["next_cfg"]}));
}

/// The table is as it was when this transaction was made up; else nothing is done and the caller tries again.
fn unchanged_rows(table: &str, name: &str, exists: bool) -> Value {
    let rows = if exists { json!([{"name": name}]) } else { json!([]) };
    json!({"op": "wait", "table": table, "where": by_name(name), "columns": ["name"], "until": "==", "rows": rows, "timeout": 0})
}

impl Vswitch {
    /// The database at a socket. Connects when first used. `deadline` bounds each operation.
    #[must_use]
    pub fn new(path: &Path, deadline: Duration) -> Self {
        Self { path: path.to_owned(), deadline, client: Mutex::new(None) }
    }

    async fn transact(&self, operations: Vec<Value>, what: &str) -> Result<Vec<Value>, OvsdbError> {
        let mut slot = self.client.lock().await;
        if slot.as_ref().is_none_or(OvsdbClient::is_closed) {
            *slot = Some(OvsdbClient::open(&self.path, self.deadline).await?);
        }
        let Some(client) = slot.as_ref() else { return Err(OvsdbError::Closed { what: what.into() }) };
        let result = client.transact(DATABASE, operations, what).await;
        if matches!(result, Err(OvsdbError::Closed { .. } | OvsdbError::Deadline { .. })) {
            *slot = None;
        }
        result
    }

    async fn rows(&self, table: &str, condition: Value, columns: &[&str]) -> Result<Vec<Value>, OvsdbError> {
        let what = format!("reading {table}");
        let select = json!({"op": "select", "table": table, "where": condition, "columns": columns});
        let mut results = self.transact(vec![select], &what).await?;
        match results[0]["rows"].take() {
            Value::Array(rows) => Ok(rows),
            _ => Err(OvsdbError::Unexpected { what }),
        }
    }

    /// Carries out a change and waits until the switch has taken it in (`cur_cfg` reaches `next_cfg`).
    async fn change(&self, mut operations: Vec<Value>, what: &str) -> Result<(), OvsdbError> {
        settle(&mut operations);
        let last = operations.len() - 1;
        let results = self.transact(operations, what).await?;
        let next = results[last]["rows"][0]["next_cfg"].as_i64();
        let next = next.ok_or_else(|| OvsdbError::Unexpected { what: what.into() })?;
        let deadline = Instant::now() + self.deadline;
        let late = || OvsdbError::Deadline { what: format!("{what} (switch)"), deadline: self.deadline };
        loop {
            let rows =
                timeout_at(deadline, self.rows(DATABASE, json!([]), &["cur_cfg"])).await.map_err(|_| late())??;
            match rows.first().and_then(|r| r["cur_cfg"].as_i64()) {
                Some(cur) if cur >= next => return Ok(()),
                _ if Instant::now() >= deadline => return Err(late()),
                _ => sleep(POLL).await,
            }
        }
    }

    /// The names of all bridges.
    pub async fn bridges(&self) -> Result<Vec<String>, OvsdbError> {
        let rows = self.rows("Bridge", json!([]), &["name"]).await?;
        Ok(rows.iter().filter_map(|r| r["name"].as_str().map(str::to_owned)).collect())
    }

    /// The kinds of datapath that the running switch has.
    pub async fn datapath_types(&self) -> Result<Vec<String>, OvsdbError> {
        let rows = self.rows(DATABASE, json!([]), &["datapath_types"]).await?;
        let types = rows.first().map(|r| read_set(&r["datapath_types"])).unwrap_or_default();
        Ok(types.into_iter().filter_map(|t| t.as_str().map(str::to_owned)).collect())
    }

    /// Makes a bridge or brings it to what it should be. Returns whether anything changed.
    pub async fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<bool, OvsdbError> {
        let columns = ["datapath_type", "fail_mode", "protocols", "other_config"];
        let rows = self.rows("Bridge", by_name(&spec.name), &columns).await?;
        let row = json!({
            "datapath_type": spec.datapath_type,
            "fail_mode": spec.fail_mode,
            "protocols": ["set", spec.protocols],
        });
        let what = format!("bridge {}", spec.name);
        let Some(have) = rows.first() else {
            let mut bridge = row;
            bridge["name"] = json!(spec.name);
            bridge["other_config"] = map(&spec.other_config);
            bridge["ports"] = json!(["named-uuid", "new_port"]);
            let operations = vec![
                unchanged_rows("Bridge", &spec.name, false),
                json!({"op": "insert", "table": "Interface", "uuid-name": "new_interface",
                    "row": {"name": spec.name, "type": "internal"}}),
                json!({"op": "insert", "table": "Port", "uuid-name": "new_port",
                    "row": {"name": spec.name, "interfaces": ["named-uuid", "new_interface"]}}),
                json!({"op": "insert", "table": "Bridge", "uuid-name": "new_bridge", "row": bridge}),
                json!({"op": "mutate", "table": DATABASE, "where": [],
                    "mutations": [["bridges", "insert", ["set", [["named-uuid", "new_bridge"]]]]]}),
            ];
            self.change(operations, &what).await?;
            return Ok(true);
        };
        let mut protocols: Vec<&str> = read_set(&have["protocols"]).into_iter().filter_map(Value::as_str).collect();
        protocols.sort_unstable();
        let mut wanted: Vec<&str> = spec.protocols.iter().map(String::as_str).collect();
        wanted.sort_unstable();
        let mut config = read_map(&have["other_config"]);
        let before = config.clone();
        config.extend(spec.other_config.clone());
        let fail_mode = read_set(&have["fail_mode"]).first().and_then(|v| v.as_str());
        let same = have["datapath_type"] == spec.datapath_type
            && fail_mode == Some(spec.fail_mode.as_str())
            && protocols == wanted
            && config == before;
        if same {
            return Ok(false);
        }
        let mut row = row;
        row["other_config"] = map(&config);
        let update = json!({"op": "update", "table": "Bridge", "where": by_name(&spec.name), "row": row});
        self.change(vec![update], &what).await?;
        Ok(true)
    }

    /// Removes a bridge with its ports. Returns whether it was there.
    pub async fn delete_bridge(&self, name: &str) -> Result<bool, OvsdbError> {
        let rows = self.rows("Bridge", by_name(name), &["_uuid"]).await?;
        let Some(row) = rows.first() else { return Ok(false) };
        let operation = json!({"op": "mutate", "table": DATABASE, "where": [],
            "mutations": [["bridges", "delete", ["set", [row["_uuid"]]]]]});
        self.change(vec![operation], &format!("removing bridge {name}")).await?;
        Ok(true)
    }

    /// The interfaces of a bridge, its own internal one included.
    pub async fn interfaces(&self, bridge: &str) -> Result<Vec<Interface>, OvsdbError> {
        let select = |table: &str, condition: Value, columns: &[&str]| json!({"op": "select", "table": table, "where": condition, "columns": columns});
        let columns = ["_uuid", "name", "type", "options", "ofport", "ofport_request", "external_ids", "error"];
        // One transaction shows one state of the database.
        let operations = vec![
            select("Bridge", by_name(bridge), &["ports"]),
            select("Port", json!([]), &["_uuid", "interfaces"]),
            select("Interface", json!([]), &columns),
        ];
        let results = self.transact(operations, "the interfaces of a bridge").await?;
        let ports: Vec<&Value> = results[0]["rows"].get(0).map(|b| read_set(&b["ports"])).unwrap_or_default();
        let mut wanted = Vec::new();
        for port in results[1]["rows"].as_array().into_iter().flatten() {
            if ports.contains(&&port["_uuid"]) {
                wanted.extend(read_set(&port["interfaces"]));
            }
        }
        let all = results[2]["rows"].as_array().into_iter().flatten();
        Ok(all.filter(|row| wanted.contains(&&row["_uuid"])).filter_map(read_interface).collect())
    }

    /// One interface by name.
    pub async fn interface(&self, name: &str) -> Result<Option<Interface>, OvsdbError> {
        let columns = ["name", "type", "options", "ofport", "ofport_request", "external_ids", "error"];
        let rows = self.rows("Interface", by_name(name), &columns).await?;
        Ok(rows.first().and_then(read_interface))
    }

    /// Makes a port with one interface or brings it to what it should be, and waits until the switch has given it a
    /// number, which is returned.
    pub async fn ensure_port(&self, bridge: &str, spec: &InterfaceSpec) -> Result<u32, OvsdbError> {
        self.ensure_ports(bridge, std::slice::from_ref(spec)).await?;
        self.wait_ofport(&spec.name).await
    }

    /// Makes or mends several ports in one transaction. Returns whether anything changed; numbers may still be missing.
    pub async fn ensure_ports(&self, bridge: &str, specs: &[InterfaceSpec]) -> Result<bool, OvsdbError> {
        let mut operations = Vec::new();
        let mut new_ports = Vec::new();
        let have = self.interfaces(bridge).await?;
        for (at, spec) in specs.iter().enumerate() {
            let mut row = json!({
                "type": spec.kind,
                "options": map(&spec.options),
                "ofport_request": set(spec.ofport_request),
                "mac": set(spec.mac.clone()),
                "mtu_request": set(spec.mtu_request),
            });
            if let Some(old) = have.iter().find(|i| i.name == spec.name) {
                let mut ids = old.external_ids.clone();
                ids.extend(spec.external_ids.clone());
                let same = old.kind == spec.kind
                    && old.options == spec.options
                    && old.ofport_request == spec.ofport_request
                    && old.external_ids == ids;
                if !same {
                    row["external_ids"] = map(&ids);
                    operations
                        .push(json!({"op": "update", "table": "Interface", "where": by_name(&spec.name), "row": row}));
                }
                continue;
            }
            row["name"] = json!(spec.name);
            row["external_ids"] = map(&spec.external_ids);
            let (interface, port) = (format!("new_interface_{at}"), format!("new_port_{at}"));
            operations.push(unchanged_rows("Port", &spec.name, false));
            operations.push(json!({"op": "insert", "table": "Interface", "uuid-name": interface, "row": row}));
            operations.push(json!({"op": "insert", "table": "Port", "uuid-name": port,
                "row": {"name": spec.name, "interfaces": ["named-uuid", interface]}}));
            new_ports.push(json!(["named-uuid", port]));
        }
        if operations.is_empty() {
            return Ok(false);
        }
        if !new_ports.is_empty() {
            operations.push(unchanged_rows("Bridge", bridge, true));
            operations.push(json!({"op": "mutate", "table": "Bridge", "where": by_name(bridge),
                "mutations": [["ports", "insert", ["set", new_ports]]]}));
        }
        self.change(operations, &format!("ports of {bridge}")).await?;
        Ok(true)
    }

    /// Waits until the switch has given an interface its number.
    pub async fn wait_ofport(&self, name: &str) -> Result<u32, OvsdbError> {
        let deadline = Instant::now() + self.deadline;
        loop {
            let interface = self.interface(name).await?;
            if let Some(port) = interface.as_ref().and_then(|i| i.ofport) {
                return Ok(port);
            }
            let error = interface.as_ref().and_then(|i| i.error.clone());
            // The switch has taken the change in before this waits: what it says is its last word.
            if error.is_some() || Instant::now() >= deadline {
                let silent = if interface.is_some() { "the switch says nothing" } else { "it is not in the database" };
                return Err(OvsdbError::NoPort { name: name.into(), reason: error.unwrap_or_else(|| silent.into()) });
            }
            sleep(POLL).await;
        }
    }

    /// Removes ports of a bridge by name; those that are not there count as removed. Returns whether any was.
    pub async fn delete_ports(&self, bridge: &str, names: &[String]) -> Result<bool, OvsdbError> {
        let rows = self.rows("Port", json!([]), &["_uuid", "name"]).await?;
        let gone: Vec<&Value> = rows
            .iter()
            .filter(|r| r["name"].as_str().is_some_and(|n| names.iter().any(|m| m == n)))
            .map(|r| &r["_uuid"])
            .collect();
        if gone.is_empty() {
            return Ok(false);
        }
        // A port without a bridge is collected by the database, and so is its interface.
        let operation = json!({"op": "mutate", "table": "Bridge", "where": by_name(bridge),
            "mutations": [["ports", "delete", ["set", gone]]]});
        self.change(vec![operation], &format!("removing ports of {bridge}")).await?;
        Ok(true)
    }

    /// Lets a switch that was restarted with `flow-restore-wait` go on, once its flows are loaded.
    pub async fn clear_restore_wait(&self) -> Result<bool, OvsdbError> {
        let rows = self.rows(DATABASE, json!([]), &["other_config"]).await?;
        let waits = rows.first().is_some_and(|r| read_map(&r["other_config"]).contains_key("flow-restore-wait"));
        if waits {
            let operation = json!({"op": "mutate", "table": DATABASE, "where": [],
                "mutations": [["other_config", "delete", ["set", ["flow-restore-wait"]]]]});
            self.change(vec![operation], "the end of flow-restore-wait").await?;
        }
        Ok(waits)
    }
}

fn read_interface(row: &Value) -> Option<Interface> {
    Some(Interface {
        name: row["name"].as_str()?.to_owned(),
        kind: row["type"].as_str()?.to_owned(),
        options: read_map(&row["options"]),
        ofport: read_port(&row["ofport"]),
        ofport_request: read_port(&row["ofport_request"]),
        external_ids: read_map(&row["external_ids"]),
        error: read_set(&row["error"]).first().and_then(|v| v.as_str()).map(str::to_owned),
    })
}
