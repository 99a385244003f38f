//! The traveller: an application that asks the metadata service for its own move to another cloud, and then back, and looks each
//! time where it is. What it knows it says again and again: lines are lost while it moves.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::{ClockWatch, boot_ms, sleep_ms};
use crate::report::{self, Report};
use crate::role::TravellerOptions;
use crate::server::REPORT_EVERY_MS;
use crate::{http, json};

/// The metadata service.
const SERVICE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);
/// How long one request may take; one that was on its way when the guest moved is never answered.
const PATIENCE: Duration = Duration::from_secs(5);
/// The time between two tries, or two looks at an operation.
const PAUSE_MS: u64 = 1000;
/// How long one leg may take, on a machine that emulates everything.
const LEG_BUDGET_MS: u64 = 180_000;

const SESSION: &str = "X-aws-ec2-metadata-token";

/// What has been seen so far.
#[derive(Debug, Clone, Default)]
struct Diary {
    /// The clouds in which it was: at the start, then, and at the end.
    clouds: [String; 3],
    /// The operations that took it.
    operations: [String; 2],
    /// What the same wish, said again after the move, was answered with.
    repeated: String,
    /// Requests that had to be made again.
    retries: u64,
    failed: String,
}

/// Travels, then goes on saying how it was.
pub fn run(options: &TravellerOptions) -> ExitCode {
    let diary = Arc::new(Mutex::new(Diary::default()));
    let (writer, to) = (Arc::clone(&diary), options.to.clone());
    std::thread::spawn(move || {
        let mut service = Service { session: None, diary: Arc::clone(&writer) };
        if let Err(error) = travel(&mut service, &to) {
            service.note(|diary| diary.failed = error.to_string());
        }
    });
    let clocks = ClockWatch::default();
    loop {
        clocks.look();
        let now = diary.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let line = Report::new("traveller")
            .word("home", &now.clouds[0])
            .word("there", &now.clouds[1])
            .word("back", &now.clouds[2])
            .word("operation_there", &now.operations[0])
            .word("operation_back", &now.operations[1])
            .word("repeated", &now.repeated)
            .number("retries", now.retries)
            .number("clock_back", clocks.times_back())
            .word("failed", &now.failed);
        report::print(&line.finish());
        sleep_ms(REPORT_EVERY_MS);
    }
}

fn travel(service: &mut Service, to: &str) -> io::Result<()> {
    let home = service.cloud()?;
    service.note(|diary| diary.clouds[0].clone_from(&home));
    // Of this boot: one that starts anew travels anew.
    let boot = report::boot_id();
    let (there, back) = (format!("there-{boot}"), format!("back-{boot}"));
    let operation = service.go(to, &there)?;
    service.note(|diary| diary.operations[0].clone_from(&operation));
    service.await_end(&operation)?;
    let cloud = service.cloud()?;
    service.note(|diary| diary.clouds[1] = cloud);
    // As an application does that never heard the answer.
    let repeated = service.go(to, &there)?;
    service.note(|diary| diary.repeated = repeated);
    let operation = service.go(&home, &back)?;
    service.note(|diary| diary.operations[1].clone_from(&operation));
    service.await_end(&operation)?;
    let cloud = service.cloud()?;
    service.note(|diary| diary.clouds[2] = cloud);
    Ok(())
}

struct Service {
    session: Option<String>,
    diary: Arc<Mutex<Diary>>,
}

impl Service {
    fn note(&self, note: impl FnOnce(&mut Diary)) {
        note(&mut self.diary.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn cloud(&mut self) -> io::Result<String> {
        let body = self.ask("GET", "/supercloud/v1/guest", None, "")?;
        json::word(&body, "cloud").map(str::to_owned).ok_or_else(|| io::Error::other("no cloud is named"))
    }

    /// Asks for the move; gives the operation.
    fn go(&mut self, to: &str, key: &str) -> io::Result<String> {
        let wish = format!("{{\"to\":\"{to}\"}}");
        let body = self.ask("POST", "/supercloud/v1/guest/migrate", Some(key), &wish)?;
        json::word(&body, "id").map(str::to_owned).ok_or_else(|| io::Error::other("no operation is named"))
    }

    fn await_end(&mut self, operation: &str) -> io::Result<()> {
        let end = boot_ms() + LEG_BUDGET_MS;
        while boot_ms() < end {
            let body = self.ask("GET", &format!("/supercloud/v1/operations/{operation}"), None, "")?;
            match json::word(&body, "phase") {
                Some("done") => return Ok(()),
                Some(phase @ ("failed" | "rolled_back")) => return Err(io::Error::other(format!("the move {phase}"))),
                _ => sleep_ms(PAUSE_MS),
            }
        }
        Err(io::Error::other("the move takes too long"))
    }

    /// One request, made again while it is worth it: the answer was lost in the move, the session ended with it, the controller is away,
    /// or the move before has not quite ended.
    fn ask(&mut self, method: &str, path: &str, key: Option<&str>, body: &str) -> io::Result<String> {
        let end = boot_ms() + LEG_BUDGET_MS;
        loop {
            let why = match self.try_once(method, path, key, body) {
                Ok((200 | 202, answer)) => return Ok(answer),
                Ok((401, _)) => {
                    self.session = None;
                    "401".to_owned()
                }
                Ok((status @ (409 | 429 | 503), answer)) if answer.contains("\"retryable\":true") => status.to_string(),
                Ok((status, answer)) => {
                    let code = json::word(&answer, "code").unwrap_or_default();
                    return Err(io::Error::other(format!("{method} {path} {status} {code}")));
                }
                Err(error) => error.to_string(),
            };
            if boot_ms() >= end {
                return Err(io::Error::other(format!("{method} {path} {why}")));
            }
            self.note(|diary| diary.retries += 1);
            sleep_ms(PAUSE_MS);
        }
    }

    fn try_once(&mut self, method: &str, path: &str, key: Option<&str>, body: &str) -> io::Result<(u16, String)> {
        let session = match &self.session {
            Some(session) => session.clone(),
            None => {
                let ttl = ("X-aws-ec2-metadata-token-ttl-seconds", "600");
                let (status, session) = http::request(SERVICE, "PUT", "/latest/api/token", &[ttl], "", PATIENCE)?;
                if status != 200 {
                    return Ok((status, session));
                }
                session.trim().to_owned()
            }
        };
        self.session = Some(session.clone());
        let mut headers = vec![(SESSION, session.as_str())];
        if let Some(key) = key {
            headers.extend([("Idempotency-Key", key), ("Content-Type", "application/json")]);
        }
        http::request(SERVICE, method, path, &headers, body, PATIENCE)
    }
}
