//! `supercloud-lab demo`, told to the end and judged.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::Once,
};

use supercloud_lab::{demo::report::Report, fleet::programs, lab::chain, state};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_supercloud-lab");

fn build_programs() {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| programs::build().unwrap_or_else(|error| panic!("{}", chain(&error))));
}

pub struct Demo {
    pub name: String,
    folder: tempfile::TempDir,
}

impl Demo {
    pub fn new(name: &str) -> Self {
        build_programs();
        Self { name: format!("t-{name}-{}", std::process::id()), folder: tempfile::tempdir().unwrap() }
    }

    pub fn json(&self) -> PathBuf {
        self.folder.path().join("result.json")
    }

    pub fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["demo", "--name", &self.name, "--json"]).arg(self.json()).args(options);
        command
    }

    pub fn run(&self, options: &[&str]) -> Output {
        let output = self.command(options).output().unwrap();
        println!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        output
    }

    pub fn report(&self) -> Report {
        serde_json::from_slice(&std::fs::read(self.json()).unwrap()).unwrap()
    }

    /// That nothing of the lab is there any more.
    pub fn assert_gone(&self) {
        assert!(!state::default_root().join(&self.name).exists(), "the lab's folder is still there");
        let of_this_lab = |line: &String| line.contains(&self.name);
        let left: Vec<String> = supercloud_lab::process::all()
            .into_iter()
            .map(|process| process.command_line())
            .filter(of_this_lab)
            .collect();
        assert!(left.is_empty(), "still running: {left:#?}");
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Whatever a failed run left.
        let _ = supercloud_lab::down(&state::default_root(), &self.name);
    }
}
