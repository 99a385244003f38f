//! The command and the dashboard check a volume's history by themselves: they hash a point alike. The same figures are in
//! `controller/dashboard/src/store/good.test.ts`.

use serde_json::json;
use supercloud_api::{VolumePoint, history::expected_hash};

#[test]
fn points_have_the_hashes_that_the_page_reckons() {
    let mut point = json!({
        "number": 7, "at_ms": 1_763_800_000_123_u64, "tick": 2, "epoch": 3, "version": 4_294_967_301_u64, "root": "ab".repeat(32),
        "cloud": "cld-01a1fea9-e617-7305-957c-ad553aef0867", "stored_bytes": 1_099_511_627_776_u64, "hash": "",
    });
    let volume = "vol-01a1fea9-e622-75ca-b41b-c7d245b5cc2f".parse().unwrap();
    let hash = |point: &serde_json::Value| {
        let point: VolumePoint = serde_json::from_value(point.clone()).unwrap();
        expected_hash(volume, &"cd".repeat(32), &point)
    };
    assert_eq!(hash(&point), "7226cfa7d46f8d85857efecc5b2d6a2f42c44c621bf35e97c1795b59e20cdfe2");
    point["memory"] =
        json!({ "root": "ef".repeat(32), "bytes": 67_108_864, "format": "supercloud-vmm/3", "is_kept": false });
    assert_eq!(hash(&point), "101e583b67b2172fb1cee1622a9fe6b541952ea24c540288a51375edf2f35008");
}
