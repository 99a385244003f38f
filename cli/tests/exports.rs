//! `supercloud image export` against a far side that breaks off, lies, and is slow; what comes of it is judged by qemu-img.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "the test waits on its own thread for what another process writes")]

use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use supercloud_api::blocks::{BLOCK_BYTES, BlockMap, Encoder, block_count};
use supercloud_cli::disk_file::{Format, Layout, PART_SUFFIX, PartError, PartFile};

const IMAGE: &str = "img-01a1fea9-e622-75ca-b41b-000000000001";

/// What the far side does with a stream of blocks.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// It ends after so many of them.
    BreaksOff(usize),
    /// One is damaged on the way.
    Damages(usize),
    /// Nothing comes after so many of them.
    Stalls(usize),
}

/// A stream that was asked for: from where, to where, only digests, and how many were given.
type Asked = (u32, u32, bool, usize);

#[derive(Default)]
struct State {
    content: Vec<u8>,
    faults: VecDeque<Fault>,
    asked: Vec<Asked>,
}

struct Far {
    url: String,
    state: Arc<Mutex<State>>,
}

fn map_of(content: &[u8]) -> BlockMap {
    let mut map = BlockMap::zeros(block_count(content.len() as u64).unwrap());
    for (block, data) in (0u32..).zip(content.chunks(BLOCK_BYTES)) {
        if data.iter().any(|byte| *byte != 0) {
            map.set(block);
        }
    }
    map
}

fn give_blocks(mut stream: &TcpStream, state: &Mutex<State>, path: &str) -> Option<()> {
    let value = |key: &str| {
        let (_, rest) = path.split_once(&format!("{key}="))?;
        rest.split('&').next()
    };
    let (from, to): (u32, u32) = (value("from_block")?.parse().ok()?, value("to_block")?.parse().ok()?);
    let digests = value("digests")? == "true";
    let (content, fault) = {
        let mut known = state.lock().unwrap();
        known.asked.push((from, to, digests, 0));
        // The first look is left alone.
        (known.content.clone(), if from == to { None } else { known.faults.pop_front() })
    };
    let number = state.lock().unwrap().asked.len() - 1;
    let map = map_of(&content);
    let root = blake3::hash(&content).to_hex().to_string();
    let (mut encoder, begun) = Encoder::begin(root, content.len() as u64, &map, from..to, digests).ok()?;
    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").ok()?;
    stream.write_all(&begun.concat()).ok()?;
    let mut next = from;
    let mut count = 0;
    while let Some(block) = map.next(next).filter(|block| *block < to) {
        match fault {
            Some(Fault::BreaksOff(after)) if count == after => return None,
            Some(Fault::Stalls(after)) if count == after => loop {
                std::thread::park();
            },
            _ => {}
        }
        let mut data = content[block as usize * BLOCK_BYTES..].to_vec();
        data.resize(BLOCK_BYTES, 0);
        let frame = if digests { encoder.digest(block, &data).ok()? } else { Some(encoder.block(block, &data).ok()?) };
        let mut frame = frame.map(|frame| frame.to_vec()).unwrap_or_default();
        if matches!(fault, Some(Fault::Damages(at)) if count == at) {
            *frame.last_mut().unwrap() ^= 1;
        }
        stream.write_all(&frame).ok()?;
        state.lock().unwrap().asked[number].3 += 1;
        (next, count) = (block + 1, count + 1);
    }
    stream.write_all(&encoder.end().ok()?.concat()).ok()
}

fn serve(mut stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split_whitespace().nth(1)?.to_owned();
    let mut header = String::from("x");
    while !header.trim().is_empty() {
        header.clear();
        reader.read_line(&mut header).ok()?;
    }
    if path.contains("/blocks?") {
        return give_blocks(stream, state, &path);
    }
    let image = serde_json::json!({ "id": IMAGE, "project": "prj-01a1fea9-e622-75ca-b41b-000000000002", "name": "lean",
        "state": "ready", "cmdline": null, "parts": [], "uploaded": [], "created_at_ms": 1 });
    let text = image.to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
    stream.write_all((head + &text).as_bytes()).ok()
}

impl Far {
    fn of(content: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { content, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(&stream.unwrap(), &shared));
            }
        });
        Self { url, state }
    }

    fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.lock().unwrap().faults = faults.into_iter().collect();
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }

    fn command(&self, folder: &Path, format: &str, file: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_supercloud"));
        for name in ["TOKEN", "TOKEN_FILE", "CA", "PROJECT", "CONTEXT"] {
            command.env_remove(format!("SUPERCLOUD_{name}"));
        }
        command.env("SUPERCLOUD_URL", &self.url).env("XDG_CONFIG_HOME", folder).current_dir(folder);
        command.args(["image", "export", "lean", "--format", format, file]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn export(&self, folder: &Path, format: &str, file: &str) -> (i32, String) {
        let Output { status, stderr, .. } = self.command(folder, format, file).output().unwrap();
        (status.code().unwrap(), String::from_utf8_lossy(&stderr).into_owned())
    }

    /// Starts an export and kills it once so many blocks are in its file.
    fn kill_after(&self, folder: &Path, format: Format, file: &str, blocks: usize) {
        let content = self.state.lock().unwrap().content.clone();
        let map = map_of(&content);
        let last = (0..map.blocks()).filter(|block| map.has(*block)).nth(blocks - 1).unwrap();
        let layout = Layout::new(format, content.len() as u64, map).unwrap();
        let length = layout.offset(last) + layout.block_len(last) as u64;
        self.faults([Fault::Stalls(blocks)]);
        let name = if format == Format::Raw { "raw" } else { "qcow2" };
        let mut child = self.command(folder, name, file).spawn().unwrap();
        let part = folder.join(format!("{file}{PART_SUFFIX}"));
        let is_there = || part.metadata().is_ok_and(|about| about.len() >= length);
        for _ in 0..6000 {
            if is_there() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_there(), "the export did not come so far");
        self.faults([]);
    }
}

/// A small generator, so that a seed tells all.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }
}

/// So many blocks and some sectors, about half of them zeros.
fn content(dice: &mut Dice, blocks: usize) -> Vec<u8> {
    let mut content = vec![0; blocks * BLOCK_BYTES + 512 * (1 + dice.roll(100) as usize)];
    for block in content.chunks_mut(BLOCK_BYTES) {
        if dice.roll(2) == 0 {
            let with = 1 + dice.roll(255) as u8;
            block.iter_mut().enumerate().for_each(|(at, byte)| *byte = with ^ (at / 512) as u8);
        }
    }
    content
}

fn data_blocks(content: &[u8]) -> usize {
    map_of(content).count(0, u32::MAX) as usize
}

fn has_qemu_img() -> bool {
    let has = Command::new("qemu-img").arg("--version").output().is_ok();
    assert!(
        has || std::env::var_os("SUPERCLOUD_REQUIRE").is_none(),
        "SUPERCLOUD_REQUIRE is set, but qemu-img is not installed"
    );
    if !has {
        println!("skipped: qemu-img is not installed");
    }
    has
}

fn qemu_img(folder: &Path, arguments: &[&str]) {
    let out = Command::new("qemu-img").args(arguments).current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {arguments:?}: {said}");
    assert!(!said.contains("leaked") && !said.contains("ERROR"), "{said}");
}

/// The file holds the content and nothing else.
fn judge(folder: &Path, format: &str, file: &str, content: &[u8]) {
    let path = folder.join(file);
    if format == "raw" {
        assert!(std::fs::read(&path).unwrap() == content, "{file} differs");
    } else if has_qemu_img() {
        std::fs::write(folder.join("wanted.raw"), content).unwrap();
        qemu_img(folder, &["check", "-q", "-f", "qcow2", file]);
        qemu_img(folder, &["compare", "-q", "-f", "qcow2", "-F", "raw", file, "wanted.raw"]);
    }
    assert!(!folder.join(format!("{file}{PART_SUFFIX}")).exists());
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600, "a disk is its owner's alone");
}

#[test]
fn an_export_holds_what_the_image_does_and_leaves_out_zeros() {
    let folder = tempfile::tempdir().unwrap();
    // 600 MiB and a bit, nearly all zeros: more than one L2 table.
    let mut content = vec![0; (600 << 20) + 1536];
    for at in [0, 5_000_000, 536_870_911, 536_870_912, content.len() - 1] {
        content[at] = 7;
    }
    let far = Far::of(content.clone());
    for format in ["raw", "qcow2"] {
        let (code, said) = far.export(folder.path(), format, format);
        assert_eq!(code, 0, "{said}");
        judge(folder.path(), format, format, &content);
        let about = folder.path().join(format).metadata().unwrap();
        assert!(about.blocks() * 512 < 2 << 20, "{format}: zeros take room: {} blocks", about.blocks());
    }
    assert!(folder.path().join("qcow2").metadata().unwrap().len() < 2 << 20);
    // What is there stays.
    far.asked();
    let (code, said) = far.export(folder.path(), "raw", "raw");
    assert!(code == 1 && said.contains("not overwritten"), "{said}");
    // An image of zeros alone has a file, too.
    let (far, zeros) = (Far::of(vec![0; 3 << 20]), vec![0; 3 << 20]);
    for (format, file) in [("raw", "zeros.raw"), ("qcow2", "zeros.qcow2")] {
        assert_eq!(far.export(folder.path(), format, file).0, 0);
        judge(folder.path(), format, file, &zeros);
    }
}

#[test]
fn blocks_that_break_off_or_come_damaged_are_asked_for_again_and_no_others() {
    let mut dice = Dice(0x5eed_0501);
    println!("seed {:#x}", dice.0);
    let folder = tempfile::tempdir().unwrap();
    let content = content(&mut dice, 60);
    let (far, blocks) = (Far::of(content.clone()), data_blocks(&content));
    far.faults([Fault::BreaksOff(0), Fault::BreaksOff(5), Fault::Damages(3), Fault::BreaksOff(1)]);
    let (code, said) = far.export(folder.path(), "qcow2", "disk");
    assert_eq!(code, 0, "{said}");
    judge(folder.path(), "qcow2", "disk", &content);
    let asked = far.asked();
    assert_eq!(asked.len(), 6, "a look, four that broke off, and the last: {asked:?}");
    let given: usize = asked.iter().map(|asked| asked.3).sum();
    // The damaged one came, and was not taken.
    assert_eq!((given, said.contains("tried again")), (blocks + 1 + (asked[3].3 - 4), true), "{asked:?}");
}

#[test]
fn an_export_that_was_killed_goes_on_with_what_is_sound() {
    let mut dice = Dice(0x5eed_0502);
    println!("seed {:#x}", dice.0);
    for (round, format) in ["raw", "qcow2", "raw", "qcow2", "raw", "qcow2"].into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let content = content(&mut dice, 80);
        let (far, blocks) = (Far::of(content.clone()), data_blocks(&content));
        let before = 4 + dice.roll(blocks as u64 - 8) as usize;
        let kind = if format == "raw" { Format::Raw } else { Format::Qcow2 };
        far.kill_after(folder.path(), kind, "disk", before);
        assert!(!folder.path().join("disk").exists());
        let part: PathBuf = folder.path().join(format!("disk{PART_SUFFIX}"));
        let file = std::fs::File::options().read(true).write(true).open(&part).unwrap();
        let length = file.metadata().unwrap().len();
        far.asked();
        // Somebody has written into it, also where zeros belong; or it was cut short.
        let harm = round / 2;
        match harm {
            0 => {}
            1 => (0..6).for_each(|_| file.write_all_at(b"harm", dice.roll(length - 4)).unwrap()),
            _ => file.set_len(dice.roll(length)).unwrap(),
        }
        let (code, said) = far.export(folder.path(), format, "disk");
        assert_eq!(code, 0, "{said}");
        judge(folder.path(), format, "disk", &content);
        let asked = far.asked();
        let fetched: usize = asked.iter().filter(|asked| !asked.2).map(|asked| asked.3).sum();
        if harm == 0 {
            assert_eq!(fetched, blocks - before, "round {round}: of {blocks}, {before} before: {asked:?}");
        }
    }
}

#[test]
fn a_part_of_something_else_is_no_harm_and_two_commands_do_not_mix() {
    let mut dice = Dice(0x5eed_0503);
    println!("seed {:#x}", dice.0);
    let folder = tempfile::tempdir().unwrap();
    let content = content(&mut dice, 30);
    let far = Far::of(content.clone());
    for (format, file, length) in [("raw", "a", 5_000_000), ("qcow2", "b", 100_000), ("qcow2", "c", 9_000_000)] {
        let other: Vec<u8> = (0..length).map(|_| dice.roll(256) as u8).collect();
        std::fs::write(folder.path().join(format!("{file}{PART_SUFFIX}")), other).unwrap();
        let (code, said) = far.export(folder.path(), format, file);
        assert_eq!(code, 0, "{said}");
        judge(folder.path(), format, file, &content);
    }
    let held = std::fs::File::create(folder.path().join(format!("d{PART_SUFFIX}"))).unwrap();
    held.lock().unwrap();
    let (code, said) = far.export(folder.path(), "raw", "d");
    assert!(code == 1 && said.contains("by another command"), "{said}");
    drop(held);
    assert_eq!(far.export(folder.path(), "raw", "d").0, 0);
}

#[test]
fn what_another_has_left_under_the_parts_name_is_not_touched() {
    let mut dice = Dice(0x5eed_0504);
    println!("seed {:#x}", dice.0);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let far = Far::of(content(&mut dice, 10));
    std::fs::write(at("precious"), "precious").unwrap();
    std::os::unix::fs::symlink(at("precious"), at(&format!("link{PART_SUFFIX}"))).unwrap();
    std::os::unix::fs::symlink(at("new"), at(&format!("dangling{PART_SUFFIX}"))).unwrap();
    std::fs::hard_link(at("precious"), at(&format!("hard{PART_SUFFIX}"))).unwrap();
    std::fs::create_dir(at(&format!("folder{PART_SUFFIX}"))).unwrap();
    assert!(Command::new("mkfifo").arg(at(&format!("pipe{PART_SUFFIX}"))).status().unwrap().success());
    let mode = at("precious").metadata().unwrap().mode();
    for (file, why) in [
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("hard", "another name"),
        ("pipe", "no plain file"),
        ("folder", "cannot open"),
    ] {
        let (code, said) = far.export(folder.path(), "raw", file);
        assert!(code == 1 && said.contains(why), "{file}: {code} {said}");
        assert!(!at(file).exists());
    }
    assert_eq!(std::fs::read(at("precious")).unwrap(), b"precious");
    assert_eq!(at("precious").metadata().unwrap().mode(), mode);
    assert!(!at("new").exists());
    // What another program calls its part stays, too.
    std::fs::write(at("d.part"), "another's").unwrap();
    assert_eq!(far.export(folder.path(), "raw", "d").0, 0);
    assert_eq!(std::fs::read(at("d.part")).unwrap(), b"another's");
}

#[test]
fn a_file_that_comes_meanwhile_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let layout = || Layout::new(Format::Raw, BLOCK_BYTES as u64, BlockMap::zeros(1)).unwrap();
    let part = PartFile::open(&path).unwrap();
    std::fs::write(&path, "came meanwhile").unwrap();
    assert!(matches!(part.finish(&layout()), Err(PartError::Exists(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"came meanwhile");
    // Nor does another file get the name that has taken the part's.
    std::fs::remove_file(&path).unwrap();
    let part = PartFile::open(&path).unwrap();
    let name = folder.path().join(format!("disk{PART_SUFFIX}"));
    std::fs::remove_file(&name).unwrap();
    std::fs::write(&name, "another").unwrap();
    assert!(matches!(part.finish(&layout()), Err(PartError::Foreign { .. })));
    assert!(!path.exists() && std::fs::read(&name).unwrap() == b"another");
}
