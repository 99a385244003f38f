//! Contents of the store as files: images' parts and volumes.

use std::{
    io::Write as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use supercloud_api::{
    blocks::{BLOCK_BYTES, Head, Item},
    client::{BlockStream, Client, ClientError, is_worth_a_retry},
};
use supercloud_cli::{
    disk_file::{Format, Layout, PART_SUFFIX, PartFile},
    progress::Rate,
};

/// How long after the blocks broke off they are asked for again.
const PAUSE: Duration = Duration::from_secs(1);
/// How long that is tried without one that comes: a controller that restarts takes less.
const LOST_BUDGET: Duration = Duration::from_secs(120);
/// Damaged blocks between which so few are sound are asked for at once.
const GAP: u32 = 64;

/// The file, and where what belongs into it is.
struct Export {
    client: Client,
    /// Of REST, ending with `/blocks`.
    path: String,
    root: String,
    layout: Arc<Layout>,
    file: Arc<PartFile>,
    rate: Rate,
}

/// Writes a content to a file that is not there yet.
///
/// # Errors
/// As every call, and when the file cannot be written. What was written stays in `FILE.supercloud-part`; the same command goes on from there.
pub async fn run(client: &Client, path: String, format: Format, file: PathBuf) -> anyhow::Result<()> {
    let (head, layout) = look(client, &path, format).await?;
    let target = file.clone();
    let part = off_runtime(move || Ok(PartFile::open(&target)?)).await?;
    let (part, layout) = (Arc::new(part), Arc::new(layout));
    let data_bytes = u64::from(layout.map().count(0, layout.map().blocks())) * BLOCK_BYTES as u64;
    let mut export = Export {
        client: client.clone(),
        path,
        root: head.root,
        layout: Arc::clone(&layout),
        file: Arc::clone(&part),
        rate: Rate::new(data_bytes),
    };
    let outcome = tokio::select! {
        outcome = export.all() => outcome,
        Ok(()) = tokio::signal::ctrl_c() => Err(crate::exit::ExportLeft.into()),
    };
    export.rate.end();
    outcome.with_context(|| format!("{}{PART_SUFFIX} is kept: the same command goes on from there", file.display()))?;
    drop(export);
    let part = Arc::into_inner(part).context("the file is still being written")?;
    let finished = Arc::clone(&layout);
    off_runtime(move || Ok(part.finish(&finished)?)).await?;
    println!("{}", file.display());
    Ok(())
}

/// What it is and where its data lies, before any of it comes.
async fn look(client: &Client, path: &str, format: Format) -> anyhow::Result<(Head, Layout)> {
    let mut stream = patiently(client, path, 0..0, false).await?;
    let Item::Head(head, map) = stream.next().await? else { bail!("the blocks do not begin with what they are of") };
    let layout = Layout::new(format, head.size_bytes, map).context("the blocks' map is of another size")?;
    Ok((*head, layout))
}

/// Opens a stream of blocks, also from a controller that is away for a moment.
async fn patiently(
    client: &Client,
    path: &str,
    range: std::ops::Range<u32>,
    digests: bool,
) -> Result<BlockStream, ClientError> {
    let began = Instant::now();
    loop {
        match client.blocks(path, range.clone(), digests).await {
            Err(error) if is_worth_a_retry(&error) && began.elapsed() < LOST_BUDGET => {
                tokio::time::sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a thread ended early")?
}

impl Export {
    async fn all(&mut self) -> anyhow::Result<()> {
        let (file, layout) = (Arc::clone(&self.file), Arc::clone(&self.layout));
        let kept = off_runtime(move || Ok(file.begin(&layout)?)).await?;
        if kept > 0 {
            self.check(kept).await?;
        }
        self.fetch(kept..self.layout.map().blocks()).await
    }

    /// Checks what an earlier run left, and fetches anew what is not as it should be.
    async fn check(&mut self, end: u32) -> anyhow::Result<()> {
        let (file, layout) = (Arc::clone(&self.file), Arc::clone(&self.layout));
        let cleared = off_runtime(move || Ok(file.clear_zeros(&layout, end)?)).await?;
        let mut bad: Vec<std::ops::Range<u32>> = Vec::new();
        let (mut sound, mut damaged, mut next) = (0u64, cleared, 0);
        let mut patience = Patience::default();
        while next < end {
            let from = next;
            let mut tell = |block, is_sound| {
                next = block + 1;
                sound += u64::from(is_sound);
                if is_sound {
                    return;
                }
                damaged += 1;
                match bad.last_mut() {
                    Some(last) if block - last.end <= GAP => last.end = block + 1,
                    _ => bad.push(block..block + 1),
                }
            };
            match self.compare(from..end, &mut tell).await {
                Ok(()) => break,
                Err(error) => patience.wait(error, next).await?,
            }
        }
        if damaged > 0 {
            eprintln!("{damaged} blocks of the part are not as they should be; they are written anew");
        }
        eprintln!("{sound} blocks were there already, and are sound");
        for range in bad {
            // Those between them are sound, and counted.
            self.rate.less(u64::from(self.layout.map().count(range.start, range.end)) * BLOCK_BYTES as u64);
            self.fetch(range).await?;
        }
        Ok(())
    }

    async fn compare(
        &mut self,
        range: std::ops::Range<u32>,
        tell: &mut (impl FnMut(u32, bool) + Send),
    ) -> anyhow::Result<()> {
        let mut stream = self.open(range, true).await?;
        loop {
            let (block, digest) = match stream.next().await? {
                Item::Digest { block, digest } => (block, digest),
                Item::End => return Ok(()),
                Item::Head(..) | Item::Block { .. } => bail!("digests were asked for, and something else came"),
            };
            let (file, layout) = (Arc::clone(&self.file), Arc::clone(&self.layout));
            let is_sound = off_runtime(move || Ok(file.holds(&layout, block, &digest)?)).await?;
            tell(block, is_sound);
            self.rate.skip(BLOCK_BYTES as u64);
        }
    }

    /// Fetches blocks until they are there, also when the connection breaks off meanwhile.
    async fn fetch(&mut self, range: std::ops::Range<u32>) -> anyhow::Result<()> {
        let (mut next, mut patience) = (range.start, Patience::default());
        while self.layout.map().next(next).is_some_and(|block| block < range.end) {
            match self.fetch_once(&mut next, range.end).await {
                Ok(()) => break,
                Err(error) => patience.wait(error, next).await?,
            }
        }
        Ok(())
    }

    async fn fetch_once(&mut self, next: &mut u32, end: u32) -> anyhow::Result<()> {
        let mut stream = self.open(*next..end, false).await?;
        loop {
            let (block, data) = match stream.next().await? {
                Item::Block { block, data } => (block, data),
                Item::End => return Ok(()),
                Item::Head(..) | Item::Digest { .. } => bail!("blocks were asked for, and something else came"),
            };
            let (file, layout) = (Arc::clone(&self.file), Arc::clone(&self.layout));
            off_runtime(move || Ok(file.write(&layout, block, &data)?)).await?;
            *next = block + 1;
            self.rate.done(BLOCK_BYTES as u64);
        }
    }

    /// A stream of what this export began with, and of nothing else.
    async fn open(&self, range: std::ops::Range<u32>, digests: bool) -> anyhow::Result<BlockStream> {
        let wanted = range.clone();
        let mut stream = self.client.blocks(&self.path, range, digests).await?;
        match stream.next().await? {
            Item::Head(head, map) if head.root == self.root && map == *self.layout.map() => {
                if (head.from..head.to, head.digests) != (wanted, digests) {
                    bail!("other blocks come than were asked for");
                }
                Ok(stream)
            }
            _ => bail!("the content is another one than a moment ago"),
        }
    }
}

/// How often something is tried again.
struct Patience {
    since: Instant,
    at: Option<u32>,
}

impl Default for Patience {
    fn default() -> Self {
        Self { since: Instant::now(), at: None }
    }
}

impl Patience {
    /// Waits before the next try; gives the error back when there is none. `at`: how far it has come, which is worth new patience.
    async fn wait(&mut self, error: anyhow::Error, at: u32) -> anyhow::Result<()> {
        if self.at != Some(at) {
            *self = Self { since: Instant::now(), at: Some(at) };
        }
        let is_worth_it = error.downcast_ref::<ClientError>().is_some_and(is_worth_a_retry);
        if !is_worth_it || self.since.elapsed() > LOST_BUDGET {
            return Err(error);
        }
        let _ = writeln!(std::io::stderr(), "\n{error:#}; it is tried again");
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }
}
