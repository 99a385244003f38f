//! An agent that can be killed: this test program again, as another process.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use supercloud_blanket::Launch;

use crate::support::Lab;

/// An agent of the tests: a process of its own, so that it can be killed. It takes one command a line.
pub struct Agent {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Agent {
    /// For the guest's move from a to b as `launch`; at which end it is.
    pub fn new(lab: &Lab, launch: &Launch, is_source: bool) -> Self {
        let me = if is_source { &lab.a } else { &lab.b };
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "an_agent_process_of_its_own", "--nocapture"])
            .env("LVT_AGENT", me.dir.join("run/libvirt-sock"))
            .env("LVT_LAUNCH", serde_json::to_string(launch).unwrap())
            .env("LVT_OUT", lab.a.dir.join("out.sock"))
            .env("LVT_IN", lab.b.dir.join("in.sock"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let from = BufReader::new(child.stdout.take().unwrap());
        Self { child, to, from }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
    }

    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the agent is gone");
            if let Some(answer) = line.trim().strip_prefix("@agent ") {
                return answer.to_owned();
            }
        }
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answer()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn from_hex(text: &str) -> Vec<u8> {
    let text = text.trim_end_matches('.');
    (0..text.len() / 2).map(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).unwrap()).collect()
}
