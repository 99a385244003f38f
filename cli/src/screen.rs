//! Where `--watch` shows its answers: what is printed is caught until it is whole, and takes the place of the one before only then. An
//! answer that does not come leaves the last one there, with its age.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Read as _, Seek as _, Write as _},
    os::fd::AsFd as _,
    time::Instant,
};

use crate::exit;

/// Home, and everything below is blank.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// The standard output that the command was given, while what it prints goes elsewhere.
pub struct Screen {
    shown: File,
    caught: File,
    is_terminal: bool,
    last: Option<(String, Instant)>,
}

impl Screen {
    /// From now on what is printed is caught.
    ///
    /// # Errors
    /// When the system has no room for it.
    pub fn take() -> io::Result<Self> {
        let stdout = io::stdout();
        let is_terminal = stdout.is_terminal();
        let shown = File::from(stdout.as_fd().try_clone_to_owned()?);
        let caught = File::from(rustix::fs::memfd_create("answer", rustix::fs::MemfdFlags::CLOEXEC)?);
        rustix::stdio::dup2_stdout(&caught)?;
        Ok(Self { shown, caught, is_terminal, last: None })
    }

    /// The answer is whole: it is shown.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn show(&mut self) -> io::Result<()> {
        let text = self.answer()?;
        let shown = if self.is_terminal { format!("{CLEAR}{text}") } else { text.clone() };
        self.last = Some((text, Instant::now()));
        self.write(&shown)
    }

    /// No answer has come, or none yet: a terminal keeps the last one, and says how old it is and why. Elsewhere nothing is said of one
    /// that may still come.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&mut self, why: Option<&str>) -> io::Result<()> {
        if why.is_some() {
            // What a call printed before it failed is no answer.
            self.answer()?;
        }
        if !self.is_terminal {
            if let Some(why) = why {
                eprintln!("error: {why}");
            }
            return Ok(());
        }
        let why = why.unwrap_or("no answer yet");
        let text = match &self.last {
            Some((last, at)) => format!("{CLEAR}{last}{why}; what stands above is {} s old\n", at.elapsed().as_secs()),
            None => format!("{CLEAR}{why}\n"),
        };
        self.write(&text)
    }

    /// What was printed since the last time.
    fn answer(&mut self) -> io::Result<String> {
        io::stdout().flush()?;
        let mut text = String::new();
        self.caught.rewind()?;
        self.caught.read_to_string(&mut text)?;
        self.caught.set_len(0)?;
        self.caught.rewind()?;
        Ok(text)
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        match self.shown.write_all(text.as_bytes()) {
            // As `println!` would.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(i32::from(exit::NO_READER)),
            written => written,
        }
    }
}
