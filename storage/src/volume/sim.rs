//! A disk in memory that forgets at a power cut what was not synced.
//!
//! At a cut every unsynced write survives wholly, partly (in sectors of 512 bytes) or not at all, independently of the
//! others; name changes survive up to some point in their order.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rand::Rng;

use super::disk::{Disk, DiskFile};

const SECTOR: usize = 512;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Punch(Range<u64>),
    Len(u64),
}

#[derive(Debug, Clone, Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Op>,
}

#[derive(Debug, Clone)]
enum NameOp {
    Set(String, usize),
    Remove(String),
}

#[derive(Debug, Default)]
struct State {
    files: Vec<Content>,
    names: HashMap<String, usize>,
    durable_names: HashMap<String, usize>,
    unsynced_names: Vec<NameOp>,
}

#[derive(Debug)]
pub(super) struct SimDisk {
    state: Arc<Mutex<State>>,
    boot: u8,
    pub syncs: Arc<AtomicUsize>,
    /// Syncs fail from now on.
    pub is_broken: Arc<AtomicBool>,
    /// Writes to this file fail after so many more: the disk is full.
    pub room: Arc<Mutex<Option<(&'static str, usize)>>>,
}

#[derive(Debug)]
struct SimFile {
    name: String,
    room: Arc<Mutex<Option<(&'static str, usize)>>>,
    state: Arc<Mutex<State>>,
    index: usize,
    syncs: Arc<AtomicUsize>,
    is_broken: Arc<AtomicBool>,
}

fn apply(data: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, bytes) => {
            let start = *offset as usize;
            if data.len() < start + bytes.len() {
                data.resize(start + bytes.len(), 0);
            }
            data[start..start + bytes.len()].copy_from_slice(bytes);
        }
        Op::Punch(range) => {
            let end = (range.end as usize).min(data.len());
            if (range.start as usize) < end {
                data[range.start as usize..end].fill(0);
            }
        }
        Op::Len(len) => data.resize(*len as usize, 0),
    }
}

impl SimDisk {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self::with(State::default(), 1))
    }

    fn with(state: State, boot: u8) -> Self {
        Self {
            state: Arc::new(Mutex::new(state)),
            boot,
            syncs: Arc::default(),
            is_broken: Arc::default(),
            room: Arc::default(),
        }
    }

    /// What is there after the process was killed: everything that was written.
    pub(super) fn after_kill(&self) -> Arc<Self> {
        let state = self.state.lock().unwrap();
        let copy = State {
            files: state.files.clone(),
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            unsynced_names: state.unsynced_names.clone(),
        };
        Arc::new(Self::with(copy, self.boot))
    }

    /// What is there after the power went.
    pub(super) fn after_power_cut(&self, rng: &mut impl Rng) -> Arc<Self> {
        let state = self.state.lock().unwrap();
        let mut names = state.durable_names.clone();
        let survived = rng.random_range(0..=state.unsynced_names.len());
        for op in &state.unsynced_names[..survived] {
            match op {
                NameOp::Set(name, index) => drop(names.insert(name.clone(), *index)),
                NameOp::Remove(name) => drop(names.remove(name)),
            }
        }
        let files = state.files.iter().map(|content| torn(content, rng)).collect();
        let state = State { files, durable_names: names.clone(), names, unsynced_names: Vec::new() };
        Arc::new(Self::with(state, self.boot + 1))
    }
}

fn torn(content: &Content, rng: &mut impl Rng) -> Content {
    let mut now = content.durable.clone();
    // Either nothing, all, or a mixture: all three are worth seeing.
    let share = [0.0, 1.0, 0.5][rng.random_range(0..3)];
    for op in &content.unsynced {
        match op {
            Op::Write(offset, bytes) => {
                let mut at = 0;
                while at < bytes.len() {
                    let end = bytes.len().min(at + SECTOR - (*offset as usize + at) % SECTOR);
                    if rng.random_bool(share) {
                        apply(&mut now, &Op::Write(offset + at as u64, bytes[at..end].to_vec()));
                    }
                    at = end;
                }
            }
            Op::Punch(_) | Op::Len(_) => {
                if rng.random_bool(share) {
                    apply(&mut now, op);
                }
            }
        }
    }
    Content { durable: now.clone(), now, unsynced: Vec::new() }
}

impl Disk for SimDisk {
    fn open(&self, name: &str, is_creating: bool) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let mut state = self.state.lock().unwrap();
        let index = match state.names.get(name) {
            Some(index) => *index,
            None if is_creating => {
                let index = state.files.len();
                state.files.push(Content::default());
                state.names.insert(name.into(), index);
                state.unsynced_names.push(NameOp::Set(name.into(), index));
                index
            }
            None => return Ok(None),
        };
        let file = SimFile {
            name: name.into(),
            room: self.room.clone(),
            state: self.state.clone(),
            index,
            syncs: self.syncs.clone(),
            is_broken: self.is_broken.clone(),
        };
        Ok(Some(Arc::new(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let index = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.into(), index);
        state.unsynced_names.push(NameOp::Set(to.into(), index));
        state.unsynced_names.push(NameOp::Remove(from.into()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.names.remove(name).is_some() {
            state.unsynced_names.push(NameOp::Remove(name.into()));
        }
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.durable_names = state.names.clone();
        state.unsynced_names.clear();
        Ok(())
    }

    fn boot_id(&self) -> [u8; 16] {
        [self.boot; 16]
    }
}

impl SimFile {
    fn op(&self, op: Op) {
        let mut state = self.state.lock().unwrap();
        let content = &mut state.files[self.index];
        apply(&mut content.now, &op);
        content.unsynced.push(op);
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        let data = &state.files[self.index].now;
        let start = (offset as usize).min(data.len());
        let len = buffer.len().min(data.len() - start);
        buffer[..len].copy_from_slice(&data[start..start + len]);
        buffer[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        if let Some((name, left)) = &mut *self.room.lock().unwrap()
            && *name == self.name
        {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        }
        self.op(Op::Write(offset, buffer.to_vec()));
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.op(Op::Punch(range));
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let state = self.state.lock().unwrap();
        let data = &state.files[self.index].now;
        let from = (offset as usize).min(data.len());
        let Some(start) = data[from..].iter().position(|b| *b != 0).map(|at| from + at) else { return Ok(None) };
        Ok(Some(start as u64..data.len() as u64))
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().files[self.index].now.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.op(Op::Len(len));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("told to fail"));
        }
        self.syncs.fetch_add(1, Ordering::SeqCst);
        let mut state = self.state.lock().unwrap();
        let content = &mut state.files[self.index];
        content.durable = content.now.clone();
        content.unsynced.clear();
        Ok(())
    }
}
