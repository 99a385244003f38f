//! Uploading the parts of an image.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use supercloud_api::{Image, ImageImport, ImagePart, Operation, client::Client};
use supercloud_cli::table::bytes;
use tokio::io::AsyncReadExt as _;

use crate::listings::word;

/// Upload pieces: the largest that the API takes.
const PIECE_BYTES: usize = 8 << 20;

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

/// Uploads a part from where the controller has it.
async fn upload(client: &Client, image: &Image, part: ImagePart, mut file: tokio::fs::File) -> anyhow::Result<()> {
    let size = file.metadata().await?.len();
    let mut offset = image.uploaded.iter().find(|u| u.part == part).map_or(0, |u| u.bytes);
    if offset > size {
        bail!("the controller has {offset} bytes of this part, more than the file has: is it another one?");
    }
    tokio::io::AsyncSeekExt::seek(&mut file, std::io::SeekFrom::Start(offset)).await?;
    while offset < size {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).await?;
        if piece.is_empty() {
            bail!("the file became shorter while it was read");
        }
        let length = piece.len() as u64;
        client.upload_part(&image.id.to_string(), part, offset, piece.into()).await?;
        offset += length;
        eprintln!("{}: {} of {} uploaded", word(part), bytes(offset), bytes(size));
    }
    Ok(())
}
