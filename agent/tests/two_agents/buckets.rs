//! Clouds whose chunk stores are buckets: on moto, an independent server, where SUPERCLOUD_MOTO names its program (deploy/moto).

use std::{
    os::unix::fs::PermissionsExt as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use supercloud_api::{handover::OperationKind, ids::FreezeId, link::Directive};
use supercloud_storage::backend::{BucketConfig, BucketStore, ObjectKey, ObjectStore as _};

use crate::{lab::Lab, sweeps::aged};

struct Moto(Child);

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn moto() -> Option<(Moto, String)> {
    let Some(program) = std::env::var_os("SUPERCLOUD_MOTO") else {
        println!("skipped: needs moto (deploy/moto)");
        return None;
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = Command::new(program)
        .args(["-H", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (moto, endpoint) = (Moto(child), format!("http://127.0.0.1:{port}"));
    supercloud_api::tls::install_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match http.put(format!("{endpoint}/chunks")).send().await {
            Ok(made) if made.status().is_success() => return Some((moto, endpoint)),
            other => assert!(Instant::now() < deadline, "moto does not come up: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_frozen_into_one_clouds_bucket_and_thawed_into_anothers() {
    let Some((_moto, endpoint)) = moto().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("credentials");
    std::fs::write(&credentials, "aws_access_key_id = AK\naws_secret_access_key = s\n").unwrap();
    std::fs::set_permissions(&credentials, std::fs::Permissions::from_mode(0o600)).unwrap();
    let bucket = |index: usize| BucketConfig {
        bucket: "chunks".into(),
        prefix: format!("cloud-{index}"),
        region: "us-east-1".into(),
        endpoint: Some(endpoint.clone()),
        credentials_file: Some(credentials.clone()),
        ca_file: "/nonexistent".into(),
    };
    let lab = Lab::begin_with(&[true, true], |index, config| config.bucket = Some(bucket(index))).await;
    let guest = lab.add_guest();
    let project = lab.controller.project(guest);
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;

    // All that the freeze names lies in the bucket, and what the host kept for itself is not needed.
    let content = lab.controller.frozen().unwrap();
    let stores = [0, 1].map(|index| BucketStore::open(&bucket(index)).unwrap());
    let key = |root: &str| ObjectKey::chunk(project, &root.parse().unwrap());
    for root in [&content.memory.root, &content.volumes[0].root] {
        assert!(stores[0].exists(key(root)).await.unwrap());
        assert!(!stores[1].exists(key(root)).await.unwrap());
    }
    let near = lab.hosts[0].config.store_dir.join(project.to_string());
    assert!(near.exists(), "the volume process stores in the host's folder");
    std::fs::remove_dir_all(&near).unwrap();

    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    let disk = key(&content.volumes[0].root);
    lab.eventually("what it stands on is in the other bucket", async || {
        stores[1].exists(disk.clone()).await.unwrap()
            && lab.controller.report(lab.hosts[1].id, guest).is_some_and(|told| told.base_missing_bytes == Some(0))
    })
    .await;
    let bytes = |entries: &[supercloud_storage::backend::ObjectEntry]| -> u64 {
        entries.iter().filter(|entry| entry.key.chunk_name().is_some()).map(|entry| entry.len).sum()
    };
    let listed = [stores[0].list("", None, 10_000).await.unwrap(), stores[1].list("", None, 10_000).await.unwrap()];
    println!("{} and {} bytes of chunks in the two buckets", bytes(&listed[0]), bytes(&listed[1]));

    // What is as young as all of this stays; what the host has beside the bucket does not count as the cloud's.
    let host = &lab.hosts[1];
    let near = host.config.store_dir.join(project.to_string());
    aged(&near);
    let memory = near.join(&key(&content.memory.root).as_str()[project.to_string().len() + 1..]);
    assert!(memory.exists(), "the thaw kept what it read");
    lab.controller.direct(host.id, Directive::DropFreeze { freeze, project, memory_root: content.memory.root.clone() });
    lab.eventually("the folder is swept", async || !memory.exists()).await;
    let swept = lab.controller.swept(host.id);
    assert!(swept.len() == 1 && swept[0].problem.is_none() && swept[0].freed_chunks == 0, "{swept:?}");
    lab.check(guest).await;
    lab.violations();
}
