//! Parts of images until they are imported: plain files `<uploads>/<image>/<part>` that only grow. How much of a part is there is
//! the file's length, so nothing has to be kept in step with it.

use std::{
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::body::Bytes;
use supercloud_api::{Code, ImagePart, UploadedPart, ids::ImageId};
use tokio::sync::Mutex;

use super::Failure;

/// Locks over which images are spread: one piece of an image at a time.
const LOCKS: usize = 16;
/// Largest kernel, in bytes.
const MAX_KERNEL_BYTES: u64 = 256 << 20;
/// Largest initial RAM disk, in bytes.
const MAX_INITRD_BYTES: u64 = 1 << 30;

/// Most that is hashed for one question: a second or two.
pub const MAX_DIGEST_BYTES: u64 = 1 << 30;

const PARTS: [ImagePart; 3] = [ImagePart::Disk, ImagePart::Kernel, ImagePart::Initrd];

/// The uploads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Uploads {
    folder: PathBuf,
    locks: Arc<[Mutex<()>; LOCKS]>,
}

/// A part's file name.
const fn part_name(part: ImagePart) -> &'static str {
    match part {
        ImagePart::Disk => "disk",
        ImagePart::Kernel => "kernel",
        ImagePart::Initrd => "initrd",
    }
}

fn limit(part: ImagePart) -> u64 {
    match part {
        ImagePart::Disk => supercloud_storage::MAX_VOLUME_BYTES,
        ImagePart::Kernel => MAX_KERNEL_BYTES,
        ImagePart::Initrd => MAX_INITRD_BYTES,
    }
}

fn failed(what: &str, error: &io::Error) -> Failure {
    if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        return Failure::new(Code::NoCapacity, "the controller's disk is full");
    }
    tracing::error!(%error, "cannot {what} an upload");
    Failure::new(Code::Internal, format!("the controller cannot {what} the upload; see its log"))
}

async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Failure::new(Code::Internal, "a fault in the controller")))
}

impl Uploads {
    /// Uploads in a folder.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, locks: Arc::new(std::array::from_fn(|_| Mutex::new(()))) }
    }

    fn lock(&self, image: ImageId) -> &Mutex<()> {
        &self.locks[usize::from(image.uuid().as_bytes()[15]) % LOCKS]
    }

    fn folder_of(&self, image: ImageId) -> PathBuf {
        self.folder.join(image.to_string())
    }

    /// How much of each part is there.
    pub async fn sizes(&self, image: ImageId) -> Result<Vec<UploadedPart>, Failure> {
        let folder = self.folder_of(image);
        off_runtime(move || {
            let mut sizes = Vec::new();
            for part in PARTS {
                match fs::metadata(folder.join(part_name(part))) {
                    Ok(found) => sizes.push(UploadedPart { part, bytes: found.len() }),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(failed("look at", &error)),
                }
            }
            Ok(sizes)
        })
        .await
    }

    /// Keeps a piece: it goes at the end, or is the last one once more. Durable when this returns.
    pub async fn append(&self, image: ImageId, part: ImagePart, offset: u64, piece: Bytes) -> Result<(), Failure> {
        if offset.saturating_add(piece.len() as u64) > limit(part) {
            return Err(Failure::new(Code::TooLarge, format!("this part may have at most {} bytes", limit(part))));
        }
        let _turn = self.lock(image).lock().await;
        let folder = self.folder_of(image);
        off_runtime(move || append(&folder, part, offset, &piece)).await
    }

    /// The length and BLAKE3 of a stretch of a part, at most [`MAX_DIGEST_BYTES`]; shorter where the part ends. `place` is dropped
    /// when the work is over, which may be after the caller has gone.
    pub async fn digest(
        &self,
        image: ImageId,
        part: ImagePart,
        offset: u64,
        bytes: u64,
        place: impl Send + 'static,
    ) -> Result<(u64, blake3::Hash), Failure> {
        let path = self.folder_of(image).join(part_name(part));
        // No lock: what is there does not change, it only grows.
        off_runtime(move || {
            let _place = place;
            let mut file = match fs::File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(Failure::new(Code::NotFound, "nothing of this part was uploaded"));
                }
                Err(error) => return Err(failed("open", &error)),
            };
            file.seek(SeekFrom::Start(offset)).map_err(|e| failed("read", &e))?;
            let mut hasher = blake3::Hasher::new();
            let read = io::copy(&mut file.take(bytes.min(MAX_DIGEST_BYTES)), &mut hasher);
            Ok((read.map_err(|e| failed("read", &e))?, hasher.finalize()))
        })
        .await
    }

    /// Removes everything of an image.
    pub async fn remove(&self, image: ImageId) -> Result<(), Failure> {
        let _turn = self.lock(image).lock().await;
        let folder = self.folder_of(image);
        off_runtime(move || match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &error)),
            _ => Ok(()),
        })
        .await
    }
}

fn append(folder: &Path, part: ImagePart, offset: u64, piece: &[u8]) -> Result<(), Failure> {
    fs::create_dir_all(folder).map_err(|e| failed("make room for", &e))?;
    let path = folder.join(part_name(part));
    let mut options = fs::OpenOptions::new();
    let mut file =
        options.create(true).truncate(false).read(true).write(true).open(&path).map_err(|e| failed("open", &e))?;
    let size = file.metadata().map_err(|e| failed("look at", &e))?.len();
    if offset != size {
        // A piece that comes again because its answer was lost.
        if offset < size && offset + piece.len() as u64 == size {
            let mut kept = vec![0; piece.len()];
            file.seek(SeekFrom::Start(offset))
                .and_then(|_| file.read_exact(&mut kept))
                .map_err(|e| failed("read", &e))?;
            if kept == piece {
                return Ok(());
            }
        }
        return Err(Failure::new(
            Code::WrongState,
            format!("offset is {offset}; {size} bytes of this part are kept, go on from there"),
        ));
    }
    file.seek(SeekFrom::Start(size)).map_err(|e| failed("write", &e))?;
    let written = file.write_all(piece).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // Leave what was there before, so that the next try starts where this one did.
        let _best_effort = file.set_len(size);
        return Err(failed("write", &error));
    }
    if size == 0 {
        // The names of the file and its folder must last too.
        let sync = |path: &Path| fs::File::open(path).and_then(|folder| folder.sync_all());
        sync(folder).and_then(|()| sync(folder.parent().unwrap_or(folder))).map_err(|e| failed("keep", &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_go_at_the_end_only_and_may_come_twice() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::new(folder.path().to_owned());
        let image = ImageId::generate();
        let put = |offset, piece: &'static [u8]| uploads.append(image, ImagePart::Disk, offset, piece.into());
        assert_eq!(uploads.sizes(image).await.unwrap(), []);
        put(0, b"abc").await.unwrap();
        put(3, b"def").await.unwrap();
        put(3, b"def").await.unwrap();
        for (offset, piece) in [(3, &b"dex"[..]), (0, b"abc"), (7, b"g"), (2, b"x")] {
            assert!(put(offset, piece).await.is_err(), "{offset}");
        }
        assert_eq!(uploads.sizes(image).await.unwrap(), [UploadedPart { part: ImagePart::Disk, bytes: 6 }]);
        assert_eq!(fs::read(folder.path().join(image.to_string()).join("disk")).unwrap(), b"abcdef");
        assert!(uploads.append(image, ImagePart::Kernel, MAX_KERNEL_BYTES, Bytes::from_static(b"x")).await.is_err());
        let digest = |offset, bytes| uploads.digest(image, ImagePart::Disk, offset, bytes, ());
        assert_eq!(digest(2, 3).await.unwrap(), (3, blake3::hash(b"cde")));
        assert_eq!(digest(4, u64::MAX).await.unwrap(), (2, blake3::hash(b"ef")));
        assert_eq!(digest(9, 1).await.unwrap(), (0, blake3::hash(b"")));
        assert!(uploads.digest(image, ImagePart::Kernel, 0, 1, ()).await.is_err());
        uploads.remove(image).await.unwrap();
        uploads.remove(image).await.unwrap();
        assert_eq!(uploads.sizes(image).await.unwrap(), []);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_place_is_kept_until_the_hashing_is_over_also_when_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::new(folder.path().to_owned());
        let image = ImageId::generate();
        let path = folder.path().join(image.to_string()).join("disk");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // A pipe: the work waits at it until somebody writes.
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let place = Arc::new(());
        let mut asked = Box::pin(uploads.digest(image, ImagePart::Disk, 0, 1, Arc::clone(&place)));
        assert!(futures::poll!(&mut asked).is_pending());
        drop(asked);
        let holders = Arc::strong_count(&place);
        let writer = tokio::task::spawn_blocking(move || fs::File::options().write(true).open(path));
        writer.await.unwrap().unwrap();
        assert_eq!(holders, 2, "the work went on, and its place was taken");
        while Arc::strong_count(&place) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
