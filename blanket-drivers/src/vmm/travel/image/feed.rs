//! Memory out of an image that lies elsewhere, while the guest runs: what it waits for first, then what is hot, then the rest.
//!
//! ```text
//!   want(page) ---> urgent blocks --+
//!   hot, then the others -----------+--> Blocks::bring ... come --> frames of pages: those that are waited for, and the rest
//!                                   ^                      |
//!                                   +----- not had now ----+   again after a while
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use super::{BLOCK_BYTES, Lay, Plan, lay::block_in_image};
use crate::vmm::{
    memory::PAGE_BYTES,
    travel::{
        TravelError,
        left::{Feed, PageSet, Served},
        pages::put_plain,
    },
};

/// Blocks on their way: that somebody waits for, that nobody waits for, and of the latter while somebody waits.
const MOST_WANTED: usize = 32;
const MOST_AHEAD: usize = 8;
const MOST_BESIDE: usize = 2;
/// Frames that wait to go, and beyond which nothing more is brought that nobody waits for.
const MOST_FRAMES: usize = 16;
/// A block that could not be had is asked for again so much later.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// While nothing at all can be had: the pause before anything is asked for; doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Who brings blocks of an image, several at once. What is brought must be what was written: whoever brings it checks that.
pub trait Blocks {
    /// Begins to bring a block of the image. It comes, or the word that it cannot be had now.
    fn bring(&mut self, block: u64);

    /// The next that has come; `None` in place of its content: it cannot be had now, or is not what was written.
    fn come(&mut self) -> Option<(u64, Option<Vec<u8>>)>;

    /// Readable when one has come.
    fn bell(&self) -> BorrowedFd<'_>;
}

/// Serves an image's memory over one connection.
#[derive(Debug)]
pub struct ImageFeed<B> {
    plan: Plan,
    blocks: B,
    /// Pages that are owed and were not put into a frame.
    owed: PageSet,
    /// Blocks of memory that were not asked for; and of these the hot ones.
    rest: PageSet,
    hot: PageSet,
    /// Where the rest goes on: behind what was waited for last.
    cursor: u64,
    /// Blocks to ask for before all others.
    urgent: VecDeque<u64>,
    on_way: BTreeSet<u64>,
    /// Pages that are waited for, by their blocks.
    waited: BTreeMap<u64, Vec<u64>>,
    urgent_frames: VecDeque<Frame>,
    frames: VecDeque<Frame>,
    /// What could not be had, and when it is tried again.
    later: VecDeque<(Instant, u64)>,
    pause: Duration,
    not_before: Option<Instant>,
}

/// Pages that go together.
#[derive(Debug, Default)]
struct Frame {
    payload: Vec<u8>,
    pages: u64,
    wanted: u64,
}

impl<B: Blocks> ImageFeed<B> {
    /// For an image that is laid out like this.
    pub fn new(lay: &Lay, blocks: B) -> Self {
        let plan = lay.plan;
        Self {
            plan,
            blocks,
            owed: PageSet::below(0),
            rest: PageSet::below(0),
            hot: lay.hot().clone(),
            cursor: 0,
            urgent: VecDeque::new(),
            on_way: BTreeSet::new(),
            waited: BTreeMap::new(),
            urgent_frames: VecDeque::new(),
            frames: VecDeque::new(),
            later: VecDeque::new(),
            pause: Duration::ZERO,
            not_before: None,
        }
    }

    /// Takes what has come.
    fn take(&mut self, now: Instant) {
        while let Some((block, content)) = self.blocks.come() {
            let Some(block) = block.checked_sub(block_in_image(0)).filter(|block| self.on_way.remove(block)) else {
                continue;
            };
            match content.filter(|content| content.len() as u64 == BLOCK_BYTES) {
                Some(content) => {
                    (self.pause, self.not_before) = (Duration::ZERO, None);
                    self.pack(block, &content);
                }
                None => {
                    self.pause = (self.pause * 2).clamp(PAUSES.0, PAUSES.1);
                    self.not_before = Some(now + self.pause);
                    self.later.push_back((now + RETRY_AFTER, block));
                }
            }
        }
    }

    fn pack(&mut self, block: u64, content: &[u8]) {
        let waited = self.waited.remove(&block).unwrap_or_default();
        let (mut wanted, mut others) = (Frame::default(), Frame::default());
        for (page, place) in self.plan.pages_of(block) {
            let Some(bytes) = content.get(place).and_then(|bytes| bytes.first_chunk()) else { continue };
            if !self.owed.remove(page) {
                continue;
            }
            let is_wanted = waited.contains(&page);
            let frame = if is_wanted { &mut wanted } else { &mut others };
            put_plain(page, bytes, &mut frame.payload);
            frame.pages += 1;
            frame.wanted += u64::from(is_wanted);
        }
        for (frame, frames) in [(wanted, &mut self.urgent_frames), (others, &mut self.frames)] {
            if frame.pages > 0 {
                frames.push_back(frame);
            }
        }
    }

    /// Asks for what may be asked for now.
    fn ask(&mut self, now: Instant) {
        while let Some((at, block)) = self.later.front().copied()
            && at <= now
        {
            self.later.pop_front();
            if self.waited.contains_key(&block) {
                self.urgent.push_back(block);
            } else {
                self.rest.insert(block);
            }
        }
        if self.not_before.is_some_and(|at| now < at) {
            return;
        }
        while self.on_way.len() < MOST_WANTED
            && let Some(block) = self.urgent.pop_front()
        {
            self.cursor = block.saturating_add(1);
            self.bring(block);
        }
        let most = if self.waited.is_empty() { MOST_AHEAD } else { MOST_BESIDE };
        let mut ahead = self.on_way.iter().filter(|block| !self.waited.contains_key(block)).count();
        while ahead < most
            && self.frames.len() < MOST_FRAMES
            && let Some(block) = self.next_of_rest()
        {
            self.bring(block);
            ahead += 1;
        }
    }

    fn next_of_rest(&mut self) -> Option<u64> {
        while let Some(block) = self.hot.first_from(0) {
            self.hot.remove(block);
            if self.rest.remove(block) {
                return Some(block);
            }
        }
        let block = self.rest.first_from(self.cursor).or_else(|| self.rest.first_from(0))?;
        self.rest.remove(block);
        self.cursor = block.saturating_add(1);
        Some(block)
    }

    fn bring(&mut self, block: u64) {
        if self.on_way.insert(block) {
            self.blocks.bring(block_in_image(block));
        }
    }
}

impl<B: Blocks> Feed for ImageFeed<B> {
    fn end(&self) -> u64 {
        self.plan.end()
    }

    fn begin(&mut self, missing: PageSet) {
        self.rest = PageSet::below(self.plan.blocks());
        for block in missing.iter().filter_map(|page| self.plan.block_of(page)) {
            self.rest.insert(block);
        }
        self.owed = missing;
    }

    fn want(&mut self, page: u64) {
        let Some(block) = self.plan.block_of(page).filter(|_| self.owed.contains(page)) else { return };
        let pages = self.waited.entry(block).or_default();
        if !pages.contains(&page) {
            pages.push(page);
        }
        // One that is on its way, or could not be had just now, comes as urgently.
        if self.rest.remove(block) {
            self.urgent.push_back(block);
        }
    }

    fn next(&mut self, may_run_ahead: bool, served: &mut Served) -> Result<Option<Vec<u8>>, TravelError> {
        let now = Instant::now();
        self.take(now);
        self.ask(now);
        let frame = match self.urgent_frames.pop_front() {
            None if may_run_ahead => self.frames.pop_front(),
            urgent => urgent,
        };
        Ok(frame.map(|Frame { payload, pages, wanted }| {
            served.sent_pages += pages;
            served.wanted_pages += wanted;
            payload
        }))
    }

    fn bell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.blocks.bell())
    }
}

const _: () = assert!(BLOCK_BYTES.is_multiple_of(PAGE_BYTES));

#[cfg(test)]
mod tests;
