//! Uploading the parts of an image.

use std::{
    io::SeekFrom,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use supercloud_api::{
    Image, ImageImport, ImagePart, Operation,
    client::{Client, ClientError, is_worth_a_retry},
};
use supercloud_cli::{progress::Rate, table::bytes};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use crate::listings::word;

/// Upload pieces: the largest that the API takes.
const PIECE_BYTES: usize = 8 << 20;
/// What is compared at once of an upload that goes on; the API takes up to 1 GiB.
const STRETCH_BYTES: u64 = 256 << 20;
/// How long after a piece was not taken it is sent again.
const PAUSE: Duration = Duration::from_secs(1);
/// How long that is tried for one piece: a controller that restarts takes less.
const LOST_BUDGET: Duration = Duration::from_secs(120);

/// The open files of an image's parts.
pub type Files = Vec<(ImagePart, tokio::fs::File)>;

/// Opens the files of an image.
///
/// # Errors
/// When one of them is not there, or empty.
pub async fn open(disk: PathBuf, kernel: Option<PathBuf>, initrd: Option<PathBuf>) -> anyhow::Result<Files> {
    let parts = [(ImagePart::Disk, Some(disk)), (ImagePart::Kernel, kernel), (ImagePart::Initrd, initrd)];
    let mut files = Vec::new();
    for (part, path) in parts {
        if let Some(path) = path {
            files.push((part, open_part(&path).await?));
        }
    }
    Ok(files)
}

/// Uploads what the controller lacks of an image, and starts the import.
///
/// # Errors
/// As every call, and when a file changes meanwhile.
pub async fn send(client: &Client, image: &Image, files: Files) -> anyhow::Result<Operation> {
    for (part, file) in files {
        upload(client, image, part, file).await?;
    }
    Ok(client.import_image(&image.id.to_string(), &ImageImport::default()).await?)
}

async fn open_part(path: &Path) -> anyhow::Result<tokio::fs::File> {
    let file = tokio::fs::File::open(path).await.with_context(|| format!("opening {}", path.display()))?;
    let about = file.metadata().await.with_context(|| format!("reading {}", path.display()))?;
    anyhow::ensure!(about.is_file() && about.len() > 0, "{} is not a file with anything in it", path.display());
    Ok(file)
}

/// Uploads a part from where the controller has it, when what it has is of this file.
async fn upload(client: &Client, image: &Image, part: ImagePart, mut file: tokio::fs::File) -> anyhow::Result<()> {
    let size = file.metadata().await?.len();
    let mut offset = image.uploaded.iter().find(|u| u.part == part).map_or(0, |u| u.bytes);
    if offset > size {
        bail!("the controller has {offset} bytes of this part, more than the file has: is it another one?");
    }
    let mut rate = Rate::new(size);
    let outcome = async {
        check(client, image, part, &mut file, offset, &mut rate).await?;
        file.seek(SeekFrom::Start(offset)).await?;
        while offset < size {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).await?;
            if piece.is_empty() {
                bail!("the file became shorter while it was read");
            }
            let length = piece.len() as u64;
            send_piece(client, image, part, offset, piece.into()).await?;
            offset += length;
            rate.done(length);
        }
        Ok(())
    };
    let outcome: anyhow::Result<()> = outcome.await;
    rate.end();
    outcome?;
    eprintln!("{}: {} uploaded", word(part), bytes(size));
    Ok(())
}

/// Sends a piece, also to a controller that is away for a while: a piece that came already is not kept twice.
async fn send_piece(
    client: &Client,
    image: &Image,
    part: ImagePart,
    offset: u64,
    piece: bytes::Bytes,
) -> Result<(), ClientError> {
    let began = Instant::now();
    loop {
        match client.upload_part(&image.id.to_string(), part, offset, piece.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if is_worth_a_retry(&error) && began.elapsed() < LOST_BUDGET => {
                eprintln!("\n{error}; it is tried again");
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Checks that the first `kept` bytes that the controller has are those of this file.
async fn check(
    client: &Client,
    image: &Image,
    part: ImagePart,
    file: &mut tokio::fs::File,
    kept: u64,
    rate: &mut Rate,
) -> anyhow::Result<()> {
    let mut at = 0;
    while at < kept {
        let stretch = (kept - at).min(STRETCH_BYTES);
        let theirs = match client.uploaded_digest(&image.id.to_string(), part, at, stretch).await {
            Ok(theirs) => theirs,
            // A controller of the version before knows no such question.
            Err(ClientError::Problem(problem)) if problem.status == 405 => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut own = file.try_clone().await?.into_std().await;
        let ours = tokio::task::spawn_blocking(move || {
            let mut hasher = blake3::Hasher::new();
            std::io::Seek::seek(&mut own, SeekFrom::Start(at))?;
            std::io::copy(&mut std::io::Read::take(&mut own, stretch), &mut hasher)?;
            Ok::<_, std::io::Error>(hasher.finalize().to_hex())
        });
        if (theirs.offset, theirs.bytes, theirs.blake3.as_str()) != (at, stretch, ours.await??.as_str()) {
            bail!(
                "what the controller has of {} from an upload before is not of this file; `supercloud image delete {}` \
                 and begin anew",
                word(part),
                image.name
            );
        }
        at += stretch;
        rate.skip(stretch);
    }
    Ok(())
}
