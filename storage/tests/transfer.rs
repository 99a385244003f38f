//! Images in and out, against the real qemu-img.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use supercloud_ids::ProjectId;
use supercloud_storage::{
    backend::{DirStore, ObjectStore},
    key::{DataKeys, ProjectKey},
    source::ChunkReader,
    transfer::{DiskFormat, ImportOptions, Imported, TransferError, export_raw, import_image, qcow2::Qcow2Error},
};
use tokio_util::sync::CancellationToken;

struct Bench {
    dir: tempfile::TempDir,
    keys: Arc<DataKeys>,
    store: Arc<DirStore>,
}

impl Bench {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
        let store = Arc::new(DirStore::open(&dir.path().join("store")).unwrap());
        Self { dir, keys, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn options(&self) -> ImportOptions {
        ImportOptions {
            format: None,
            work_folder: self.dir.path().to_owned(),
            convert_budget: Duration::from_secs(120),
        }
    }

    async fn import(&self, path: &Path) -> Result<Imported, TransferError> {
        let store: Arc<dyn ObjectStore> = self.store.clone();
        let mut last = 0;
        let result = import_image(path, &self.options(), self.keys.clone(), store, &CancellationToken::new(), |p| {
            assert!(p.done_bytes >= last && p.done_bytes <= p.total_bytes);
            last = p.done_bytes;
        })
        .await;
        let left = std::fs::read_dir(self.dir.path()).unwrap().flatten();
        assert!(left.into_iter().all(|e| !e.file_name().to_string_lossy().starts_with("import-")), "left behind");
        result
    }

    async fn export(&self, imported: &Imported, name: &str) -> PathBuf {
        let reader = ChunkReader::of_store(self.keys.clone(), self.store.clone());
        let path = self.path(name);
        export_raw(&reader, imported.root, &path, &CancellationToken::new(), |_| {}).await.unwrap();
        path
    }
}

/// A sparse disk with some data, of a length that is no multiple of a block.
fn make_raw(path: &Path, len: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(42);
    for _ in 0..40 {
        let mut data = vec![0; rng.random_range(1..200_000)];
        rng.fill(&mut data[..]);
        let at = rng.random_range(0..len - data.len() as u64);
        file.write_all_at(&data, at).unwrap();
    }
    file.write_all_at(b"the end", len - 7).unwrap();
}

fn has_qemu_img() -> bool {
    let has = Command::new("qemu-img").arg("--version").output().is_ok();
    if !has {
        assert!(
            std::env::var_os("SUPERCLOUD_REQUIRE").is_none(),
            "SUPERCLOUD_REQUIRE is set, but qemu-img is not installed"
        );
        println!("skipped: qemu-img is not installed");
    }
    has
}

fn qemu_img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_image_comes_back_and_a_second_import_stores_nothing() {
    let bench = Bench::new();
    let raw = bench.path("disk.raw");
    make_raw(&raw, (200 << 20) + 12_345);
    let first = bench.import(&raw).await.unwrap();
    assert_eq!(first.format, DiskFormat::Raw);
    assert!(first.chunks > 0 && first.chunks < 3000 && first.new_chunks == first.chunks, "{first:?}");
    let second = bench.import(&raw).await.unwrap();
    assert_eq!((second.root, second.new_chunks), (first.root, 0));

    let out = bench.export(&first, "out.raw").await;
    let (mut want, got) = (std::fs::read(&raw).unwrap(), std::fs::read(&out).unwrap());
    want.resize(first.size_bytes as usize, 0);
    assert!(want == got, "the exported image differs");
    use std::os::unix::fs::MetadataExt as _;
    assert!(std::fs::metadata(&out).unwrap().blocks() * 512 < 20 << 20, "holes were filled");
}

#[tokio::test(flavor = "multi_thread")]
async fn qcow2_and_raw_of_the_same_disk_are_the_same_image() {
    if !has_qemu_img() {
        return;
    }
    let bench = Bench::new();
    let (raw, qcow2) = (bench.path("disk.raw"), bench.path("disk.qcow2"));
    make_raw(&raw, 100 << 20);
    for extra in
        [["-o", "compat=1.1"], ["-o", "compat=0.10"], ["-c", "-q"], ["-o", "compression_type=zstd,extended_l2=on"]]
    {
        let args =
            [&["convert", "-f", "raw", "-O", "qcow2"], &extra[..], &[raw.to_str().unwrap(), qcow2.to_str().unwrap()]];
        qemu_img(&args.concat());
        let from_qcow2 = bench.import(&qcow2).await.unwrap();
        assert_eq!(from_qcow2.format, DiskFormat::Qcow2);
        assert_eq!(from_qcow2.root, bench.import(&raw).await.unwrap().root, "{extra:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_reach_outside_are_refused_by_name() {
    if !has_qemu_img() {
        return;
    }
    let bench = Bench::new();
    let (raw, overlay) = (bench.path("disk.raw"), bench.path("overlay.qcow2"));
    make_raw(&raw, 10 << 20);
    let (raw, overlay) = (raw.to_str().unwrap(), overlay.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", overlay]);
    let refused = bench.import(Path::new(overlay)).await;
    assert!(matches!(refused, Err(TransferError::Qcow2(Qcow2Error::BackingFile))), "{refused:?}");

    let data = format!("data_file={}", bench.path("ext.data").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, overlay, "10M"]);
    let refused = bench.import(Path::new(overlay)).await;
    assert!(matches!(refused, Err(TransferError::Qcow2(Qcow2Error::ExternalDataFile))), "{refused:?}");

    // The header's field by hand: qemu-img measures the machine's speed to make a real one, and fails on a busy one.
    qemu_img(&["create", "-q", "-f", "qcow2", overlay, "10M"]);
    std::fs::File::options().write(true).open(overlay).unwrap().write_all_at(&[0, 0, 0, 2], 32).unwrap();
    let refused = bench.import(Path::new(overlay)).await;
    assert!(matches!(refused, Err(TransferError::Qcow2(Qcow2Error::Encrypted(2)))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_qcow2_fails_cleanly() {
    if !has_qemu_img() {
        return;
    }
    let bench = Bench::new();
    let (raw, qcow2) = (bench.path("disk.raw"), bench.path("disk.qcow2"));
    make_raw(&raw, 10 << 20);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    // The L1 table points far outside.
    let file = std::fs::File::options().read(true).write(true).open(&qcow2).unwrap();
    let mut at = [0; 8];
    file.read_exact_at(&mut at, 40).unwrap();
    file.write_all_at(&[0x7f; 8], u64::from_be_bytes(at)).unwrap();
    let failed = bench.import(&qcow2).await;
    assert!(matches!(failed, Err(TransferError::Convert { .. })), "{failed:?}");
}

#[tokio::test]
async fn what_is_no_image_is_refused() {
    let bench = Bench::new();
    let empty = bench.path("empty");
    std::fs::write(&empty, b"").unwrap();
    assert!(matches!(bench.import(&empty).await, Err(TransferError::Size { size_bytes: 0, .. })));
    assert!(matches!(bench.import(&bench.path("absent")).await, Err(TransferError::File { .. })));
    assert!(matches!(bench.import(Path::new("/dev/null")).await, Err(TransferError::Format { .. })));
    let huge = bench.path("huge");
    std::fs::File::create(&huge).unwrap().set_len((2 << 40) + 512).unwrap();
    assert!(matches!(bench.import(&huge).await, Err(TransferError::Size { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_import_says_so() {
    let bench = Bench::new();
    let raw = bench.path("disk.raw");
    make_raw(&raw, 10 << 20);
    let cancel = CancellationToken::new();
    cancel.cancel();
    let store: Arc<dyn ObjectStore> = bench.store.clone();
    let result = import_image(&raw, &bench.options(), bench.keys.clone(), store, &cancel, |_| {}).await;
    assert!(matches!(result, Err(TransferError::Cancelled)));
}
