//! What a disk's GRUB configuration would boot: the part of GRUB's script language that decides it, as distributions write it.
//!
//! Format: the GRUB manual, "Writing full configuration files directly" and "The GRUB environment block"; boot loader entries
//! (`blscfg`): the Boot Loader Specification, type 1. Pure; the text is a guest's, so everything is bounded.
//!
//! Assignments, tests of texts (`if [ ... ]`), menus, `linux`, `initrd` and `blscfg` are understood. A condition of another kind
//! is taken for false, functions and loops are left out, other commands mean nothing here.

use std::{cmp::Ordering, collections::BTreeMap};

/// Largest configuration that is read, and all boot loader entries together.
pub const MAX_TEXT_BYTES: u64 = 256 << 10;
/// Deepest nesting, most entries of a menu, most variables.
const MAX_DEPTH: usize = 32;
const MAX_ENTRIES: usize = 256;
const MAX_VARIABLES: usize = 512;
/// Most words of a statement, and most bytes of them all once variables have their values: a kernel takes 2,047 of a command
/// line.
const MAX_WORDS: usize = 256;
const MAX_STATEMENT_BYTES: usize = 8192;

/// What is to be booted; paths are of the file system that holds the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    /// The kernel.
    pub kernel: String,
    /// Initial ramdisks, in order.
    pub initrds: Vec<String>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Variables of GRUB.
pub type Variables = BTreeMap<String, String>;

/// The variables of an environment block.
#[must_use]
pub fn environment(block: &str) -> Variables {
    let lines = block.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.split_once('=')).take(MAX_VARIABLES);
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Entry { title: String, id: String, choice: Choice },
    Menu { title: String, id: String, nodes: Vec<Node> },
}

/// What a configuration comes to.
#[derive(Debug, Default)]
pub struct Menu {
    nodes: Vec<Node>,
    variables: Variables,
    /// Boot loader entries count as well.
    pub wants_entries: bool,
}

/// A piece of a word: as it is, or a variable's value.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Plain(String),
    Variable(String),
}

type Word = Vec<Piece>;

/// Statements as they are collected. A brace ends the one before it, or the one that it opens a block for.
#[derive(Default)]
struct Statements {
    all: Vec<Vec<Word>>,
    words: Vec<Word>,
}

impl Statements {
    fn word(&mut self, word: Option<Word>) {
        let is = |text: &str| word.as_ref().is_some_and(|word| matches!(&word[..], [Piece::Plain(it)] if it == text));
        let (opens, closes) = (is("{"), is("}"));
        if closes {
            self.end();
        }
        self.words.extend(word);
        if opens || closes {
            self.end();
        }
    }

    fn end(&mut self) {
        if !self.words.is_empty() {
            self.all.push(std::mem::take(&mut self.words));
        }
    }
}

/// The statements of a script, as lists of words.
fn statements(text: &str) -> Vec<Vec<Word>> {
    let mut found = Statements::default();
    let mut word: Option<Word> = None;
    let mut quote = None;
    let mut chars = text.chars().peekable();
    let push = |word: &mut Option<Word>, c: char| match word.get_or_insert_default().last_mut() {
        Some(Piece::Plain(text)) => text.push(c),
        _ => word.get_or_insert_default().push(Piece::Plain(c.to_string())),
    };
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\'', Some('\'')) | ('"', Some('"')) => quote = None,
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('\\', None | Some('"')) => match chars.next() {
                Some('\n') | None => {}
                Some(next) => {
                    if quote.is_some() && !matches!(next, '$' | '"' | '\\') {
                        push(&mut word, '\\');
                    }
                    push(&mut word, next);
                }
            },
            ('$', None | Some('"')) => {
                let is_braced = chars.next_if_eq(&'{').is_some();
                let mut name = String::new();
                while let Some(next) =
                    chars.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '?' | '@' | '#'))
                {
                    name.push(next);
                }
                if is_braced {
                    chars.next_if_eq(&'}');
                }
                word.get_or_insert_default().push(Piece::Variable(name));
            }
            ('#', None) if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
            ('\n' | ';', None) => {
                found.word(word.take());
                found.end();
            }
            (c, None) if c.is_whitespace() => found.word(word.take()),
            (c, _) => push(&mut word, c),
        }
    }
    found.word(word);
    found.end();
    found.all
}

/// What a statement stands in.
enum Frame {
    /// Whether a branch of it was taken, and whether this one is.
    If {
        was_taken: bool,
        is_taken: bool,
    },
    /// A function's body, a loop, a block of no known kind.
    Skipped,
    Entry {
        title: String,
        id: String,
        choice: Choice,
    },
    Menu {
        title: String,
        id: String,
        nodes: Vec<Node>,
    },
}

impl Menu {
    /// Reads a configuration, with the variables of the environment block.
    #[must_use]
    pub fn read(text: &str, environment: Variables) -> Self {
        let mut menu = Self { variables: environment, ..Self::default() };
        menu.variables.insert("feature_menuentry_id".to_owned(), "y".to_owned());
        menu.variables.insert("menuentry_id_option".to_owned(), "--id".to_owned());
        let mut frames = Vec::new();
        for statement in statements(text) {
            menu.run(&statement, &mut frames);
        }
        // What was not closed counts as closed.
        while let Some(frame) = frames.pop() {
            menu.close(frame, &mut frames);
        }
        menu
    }

    /// A statement's words with their variables' values: as much as is believed of one.
    fn expand(&self, statement: &[Word]) -> Vec<String> {
        let mut left = MAX_STATEMENT_BYTES;
        let mut words = Vec::new();
        for word in statement.iter().take(MAX_WORDS) {
            let mut out = String::new();
            for piece in word {
                let text = match piece {
                    Piece::Plain(text) => text,
                    Piece::Variable(name) => self.variables.get(name).map_or("", String::as_str),
                };
                if text.len() <= left {
                    left -= text.len();
                    out.push_str(text);
                }
            }
            words.push(out);
        }
        words
    }

    fn run(&mut self, statement: &[Word], frames: &mut Vec<Frame>) {
        let words = self.expand(statement);
        let mut words = words.as_slice();
        while let Some((first, rest)) = words.split_first() {
            let is_active = frames.iter().all(|frame| match frame {
                Frame::If { is_taken, .. } => *is_taken,
                Frame::Skipped => false,
                Frame::Entry { .. } | Frame::Menu { .. } => true,
            });
            match first.as_str() {
                // What follows in the same line is a statement of its own.
                "then" | "do" => {
                    words = rest;
                    continue;
                }
                "if" => {
                    let is_taken = self.test(rest);
                    open(frames, Frame::If { was_taken: is_taken, is_taken });
                }
                "elif" | "else" => {
                    let is_so = first == "else" || self.test(rest);
                    if let Some(Frame::If { was_taken, is_taken }) = frames.last_mut() {
                        *is_taken = is_so && !*was_taken;
                        *was_taken |= *is_taken;
                    }
                    if first == "else" {
                        words = rest;
                        continue;
                    }
                }
                "fi" | "done" | "}" => {
                    if let Some(frame) = frames.pop() {
                        self.close(frame, frames);
                    }
                }
                "for" | "while" | "until" => open(frames, Frame::Skipped),
                "menuentry" | "submenu" if is_active => {
                    let (title, id) = named(rest);
                    open(
                        frames,
                        match first.as_str() {
                            "menuentry" => Frame::Entry { title, id, choice: Choice::default() },
                            _ => Frame::Menu { title, id, nodes: Vec::new() },
                        },
                    );
                }
                _ if words.last().is_some_and(|last| last == "{") => open(frames, Frame::Skipped),
                _ if is_active => self.command(first, rest, frames),
                _ => {}
            }
            return;
        }
    }

    fn command(&mut self, first: &str, rest: &[String], frames: &mut [Frame]) {
        if let ("linux" | "linux16" | "linuxefi", Some(Frame::Entry { choice, .. })) = (first, frames.last_mut()) {
            if let Some((kernel, arguments)) = rest.split_first() {
                kernel.clone_into(&mut choice.kernel);
                choice.cmdline = arguments.join(" ");
            }
            return;
        }
        if let ("initrd" | "initrd16" | "initrdefi", Some(Frame::Entry { choice, .. })) = (first, frames.last_mut()) {
            choice.initrds = rest.to_vec();
            return;
        }
        if first == "blscfg" {
            self.wants_entries = true;
        }
        let assignment = if first == "set" { rest.first().map(String::as_str) } else { Some(first) };
        if let Some((name, value)) = assignment.and_then(|text| text.split_once('='))
            && !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && (self.variables.len() < MAX_VARIABLES || self.variables.contains_key(name))
        {
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }

    /// A condition: the tests of texts.
    fn test(&self, words: &[String]) -> bool {
        let [open, inner @ .., close] = words else { return false };
        if open != "[" || close != "]" {
            return false;
        }
        match inner {
            [only] => !only.is_empty(),
            [flag, text] if flag == "-n" => !text.is_empty(),
            [flag, text] if flag == "-z" => text.is_empty(),
            [flag, path] if flag == "-s" || flag == "-f" || flag == "-e" => path.ends_with("/grubenv"),
            [not, text] if not == "!" => text.is_empty(),
            [left, sign, right] if sign == "=" || sign == "==" => left == right,
            [left, sign, right] if sign == "!=" => left != right,
            _ => false,
        }
    }

    fn close(&mut self, frame: Frame, frames: &mut [Frame]) {
        let node = match frame {
            Frame::Entry { title, id, choice } if !choice.kernel.is_empty() => Node::Entry { title, id, choice },
            Frame::Menu { title, id, nodes } => Node::Menu { title, id, nodes },
            _ => return,
        };
        let menu = frames.iter_mut().rev().find_map(|frame| match frame {
            Frame::Menu { nodes, .. } => Some(nodes),
            _ => None,
        });
        let nodes = menu.unwrap_or(&mut self.nodes);
        if nodes.len() < MAX_ENTRIES {
            nodes.push(node);
        }
    }

    /// Adds boot loader entries, given as their names (without `.conf`) and texts; the newest comes first.
    pub fn add_entries(&mut self, mut entries: Vec<(String, String)>) {
        entries.sort_by(|(left, _), (right, _)| compare_versions(right, left));
        for (id, text) in entries.into_iter().take(MAX_ENTRIES) {
            let mut title = String::new();
            let mut choice = Choice::default();
            let lines = text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
            for (key, value) in lines.map(|(key, value)| (key, value.trim())) {
                match key {
                    "title" => value.clone_into(&mut title),
                    "linux" => value.clone_into(&mut choice.kernel),
                    "initrd" if choice.initrds.len() < MAX_WORDS => {
                        choice.initrds.extend(value.split_whitespace().take(MAX_WORDS).map(str::to_owned));
                    }
                    "options" if choice.cmdline.len() < MAX_STATEMENT_BYTES => {
                        let words: Vec<Word> = statements(value).into_iter().flatten().collect();
                        let gap = if choice.cmdline.is_empty() { "" } else { " " };
                        choice.cmdline = format!("{}{gap}{}", choice.cmdline, self.expand(&words).join(" "));
                    }
                    _ => {}
                }
            }
            // What a variable stands for may be nothing.
            choice.initrds.retain(|path| path.starts_with('/'));
            if !choice.kernel.is_empty() {
                self.nodes.push(Node::Entry { title, id, choice });
            }
        }
    }

    /// What it boots by itself; `None` when there is nothing to boot.
    #[must_use]
    pub fn choice(&self) -> Option<Choice> {
        let value = |name| self.variables.get(name).map_or("", String::as_str);
        let wanted = match value("default") {
            "saved" | "" => value("saved_entry"),
            wanted => wanted,
        };
        let mut nodes = self.nodes.as_slice();
        let mut parts = wanted.split('>').map(str::trim);
        for _ in 0..=MAX_DEPTH {
            let part = parts.next().filter(|part| !part.is_empty());
            let found = part.and_then(|part| {
                let by_name = nodes.iter().find(|node| match node {
                    Node::Entry { title, id, .. } | Node::Menu { title, id, .. } => title == part || id == part,
                });
                by_name.or_else(|| nodes.get(part.parse::<usize>().ok()?))
            });
            match found.or_else(|| nodes.first())? {
                Node::Entry { choice, .. } => return Some(Choice { kernel: plain(&choice.kernel), ..choice.clone() }),
                Node::Menu { nodes: inner, .. } => nodes = inner,
            }
        }
        None
    }
}

/// A path without the device before it.
fn plain(path: &str) -> String {
    match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        Some((_, path)) => path.to_owned(),
        None => path.to_owned(),
    }
}

fn open(frames: &mut Vec<Frame>, frame: Frame) {
    // Beyond that, what is nested closes what it stands in: wrong, and harmless.
    if frames.len() < MAX_DEPTH {
        frames.push(frame);
    }
}

/// Title and id of a menu entry.
fn named(words: &[String]) -> (String, String) {
    let mut id = String::new();
    let mut title = None;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.strip_prefix("--") {
            Some("id") => words.next().cloned().unwrap_or_default().clone_into(&mut id),
            Some("class" | "users" | "hotkey") => drop(words.next()),
            Some(option) => {
                if let Some(value) = option.strip_prefix("id=") {
                    value.clone_into(&mut id);
                }
            }
            None if title.is_none() => title = Some(word.clone()),
            None => {}
        }
    }
    (title.unwrap_or_default(), id)
}

/// Runs of digits by their value, others as text; a text that goes on is the newer one.
fn compare_versions(left: &str, right: &str) -> Ordering {
    let split = |text: &str| -> Vec<(String, bool)> {
        let mut runs: Vec<(String, bool)> = Vec::new();
        for c in text.chars() {
            let is_digit = c.is_ascii_digit();
            match runs.last_mut() {
                Some((run, kind)) if *kind == is_digit => run.push(c),
                _ => runs.push((c.to_string(), is_digit)),
            }
        }
        runs
    };
    let (left, right) = (split(left), split(right));
    for ((a, a_digits), (b, b_digits)) in left.iter().zip(&right) {
        let order = if *a_digits && *b_digits {
            let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            a.cmp(b)
        };
        if order.is_ne() {
            return order;
        }
    }
    left.len().cmp(&right.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As Debian's `update-grub` writes it, shortened.
    const DEBIAN: &str = r#"
#
# DO NOT EDIT THIS FILE
#
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi

if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi

export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function load_video { if [ x$feature_all_video_module = xy ]; then insmod all_video; else insmod efi_gop; fi }
if [ "${recordfail}" = 1 ] ; then
  set timeout=30
else
  if [ x$feature_timeout_style = xy ] ; then set timeout_style=menu
    set timeout=0
  # Fallback normal timeout code
  else
    set timeout=0
  fi
fi
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux $menuentry_id_option 'gnulinux-simple-8f3' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1 8f3
	else
	  search --no-floppy --fs-uuid --set=root 8f3
	fi
	echo	'Loading Linux 6.1.0-28-cloud-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-28-cloud-amd64 root=UUID=8f3 ro  console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0
	initrd	/boot/initrd.img-6.1.0-28-cloud-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-8f3' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-28-cloud-amd64' --class debian $menuentry_id_option 'gnulinux-28' {
		linux	/boot/vmlinuz-6.1.0-28-cloud-amd64 root=UUID=8f3 ro
		initrd	/boot/initrd.img-6.1.0-28-cloud-amd64
	}
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-27-cloud-amd64' --class debian $menuentry_id_option 'gnulinux-27' {
		linux	/boot/vmlinuz-6.1.0-27-cloud-amd64 root=UUID=8f3 ro
		initrd	/boot/early.img /boot/initrd.img-6.1.0-27-cloud-amd64
	}
}
"#;

    fn kernel(text: &str, environment: &[(&str, &str)]) -> Option<Choice> {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Menu::read(text, environment).choice()
    }

    #[test]
    fn debians_configuration_boots_what_debian_would() {
        let choice = kernel(DEBIAN, &[]).unwrap();
        assert_eq!(choice.kernel, "/boot/vmlinuz-6.1.0-28-cloud-amd64");
        assert_eq!(choice.initrds, ["/boot/initrd.img-6.1.0-28-cloud-amd64"]);
        let line = "root=UUID=8f3 ro console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0";
        assert_eq!(choice.cmdline, line);
        // Once something else, as `grub-reboot` asks for: by id, by title, by number.
        for wanted in [
            "gnulinux-advanced-8f3>gnulinux-27",
            "Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-27-cloud-amd64",
            "1>1",
        ] {
            let choice = kernel(DEBIAN, &[("next_entry", wanted)]).unwrap();
            assert_eq!(choice.kernel, "/boot/vmlinuz-6.1.0-27-cloud-amd64", "{wanted}");
            assert_eq!(choice.initrds.len(), 2);
        }
        // What is not there is the first; a menu is its first entry.
        assert_eq!(kernel(DEBIAN, &[("next_entry", "gone")]).unwrap(), choice);
        assert_eq!(kernel(DEBIAN, &[("next_entry", "1")]).unwrap().cmdline, "root=UUID=8f3 ro");
        let saved = DEBIAN.replace("set default=\"0\"", "set default=\"${saved_entry}\"");
        assert_eq!(kernel(&saved, &[("saved_entry", "1>1")]).unwrap().initrds.len(), 2);
    }

    #[test]
    fn loader_entries_are_the_newest_first() {
        let entry = |version: &str| {
            let text = format!(
                "title Fedora ({version})\nversion {version}\nlinux /vmlinuz-{version}\ninitrd /initramfs-{version}.img \
                 $tuned_initrd\noptions $kernelopts quiet \"a b\"\ngrub_users $grub_users\n"
            );
            (format!("f3a-{version}"), text)
        };
        let environment =
            environment("# GRUB Environment Block\nkernelopts=root=UUID=9 ro\nsaved_entry=f3a-6.9.4-200\n####");
        for (saved, wanted) in [(true, "6.9.4-200"), (false, "6.12.1-100")] {
            let mut variables = environment.clone();
            if !saved {
                variables.remove("saved_entry");
            }
            let mut menu = Menu::read("set default=\"${saved_entry}\"\ninsmod blscfg\nblscfg\n", variables);
            assert!(menu.wants_entries);
            menu.add_entries([entry("6.9.4-200"), entry("6.12.1-100"), entry("6.9.10-100")].to_vec());
            let choice = menu.choice().unwrap();
            assert_eq!(
                (choice.kernel, choice.initrds),
                (format!("/vmlinuz-{wanted}"), vec![format!("/initramfs-{wanted}.img")])
            );
            assert_eq!(choice.cmdline, "root=UUID=9 ro quiet a b");
        }
    }

    #[test]
    fn quotes_escapes_devices_and_conditions() {
        let text = "x=\"a $y\\\"\\n\"; set y='$z'\nmenuentry 'it'\\''s {' {\n linux ($root)/k a=\"$y\" b\\ c \\\n d # no\n}\n\
                    if [ -z \"$none\" ] ; then if [ a != a ]; then set default=9; elif [ ! \"$none\" ]; then set default=1; fi; fi\n\
                    menuentry two { linux /two\n}";
        let menu = Menu::read(text, Variables::new());
        assert_eq!(menu.variables["x"], "a \"\\n");
        assert_eq!(menu.choice().unwrap().kernel, "/two");
        let first = Menu::read(&text.replace("default=1", "default=0"), Variables::new()).choice().unwrap();
        assert_eq!((first.kernel.as_str(), first.cmdline.as_str()), ("/k", "a=$z b c d"));
        assert_eq!(kernel("menuentry empty {\n}\n", &[]), None);
        assert_eq!(kernel("", &[]), None);
    }

    /// Each would take gigabytes if it were believed.
    #[test]
    fn texts_that_grow_without_end_are_cut_off() {
        let room = usize::try_from(MAX_TEXT_BYTES).unwrap();
        let long = "x".repeat(4000);
        let grows = |line: &str| format!("a={long}\nmenuentry m {{\n{line}\n}}").chars().take(room).collect::<String>();
        let words = " $a".repeat(room / 3);
        for text in [
            "then ".repeat(room / 5),
            "else ".repeat(room / 5),
            "if ".repeat(room / 3),
            "{ ".repeat(room / 2),
            "submenu a { ".repeat(room / 12),
            "menuentry a { linux /k ; } ; ".repeat(room / 30),
            (0..room / 8).map(|n| format!("v{n}=1;")).collect(),
            grows(&format!("linux /k{words}")),
            grows(&format!("initrd{words}")),
        ] {
            let choice = kernel(&text, &[]).unwrap_or_default();
            let bytes = choice.cmdline.len() + choice.initrds.iter().map(String::len).sum::<usize>();
            assert!(bytes <= 2 * MAX_STATEMENT_BYTES, "{:.40}: {bytes}", text);
        }
        let mut menu = Menu::read(&format!("a={long}"), Variables::new());
        menu.add_entries(vec![("e".to_owned(), format!("linux /k\noptions{words}\noptions{words}\n"))]);
        assert!(menu.choice().unwrap().cmdline.len() <= 2 * MAX_STATEMENT_BYTES + MAX_WORDS);
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in "[a-z0-9$={}\\[\\]'\"\\\\;# \n]{0,300}", words in proptest::collection::vec(
            prop_oneof!["if", "fi", "else", "menuentry", "submenu", "\\{", "\\}", "\n", "linux /k", "\\[", "\\]", "set a=\\$a\\$a"], 0..200)) {
            let _ = kernel(&text, &[]);
            let _ = kernel(&words.join(" "), &[("a", "xxxxxxxxxxxxxxxx")]);
            let mut menu = Menu::read("", Variables::new());
            menu.add_entries(vec![("x".to_owned(), text)]);
            let _ = menu.choice();
        }

        #[test]
        fn versions_are_ordered(left in "[0-9.a-c-]{0,8}", right in "[0-9.a-c-]{0,8}") {
            prop_assert_eq!(compare_versions(&left, &right), compare_versions(&right, &left).reverse());
        }
    }
}
