//! Xen's own program `xl`, and what it says.

use std::{ffi::OsStr, process::Stdio, time::Duration};

use supercloud_blanket::{BackendError, BackendResult};
use tokio::{process::Command, time::timeout};

/// How much of a program's words goes into an error.
const MAX_WORDS: usize = 1024;

/// Why a domain's processors stand still for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// It powered itself off.
    PowerOff,
    /// It wants to boot again.
    Reboot,
    /// It is suspended: all of it is in a stream.
    Suspend,
    /// It crashed, or anything else.
    Crash,
}

/// A domain, as `xl list` tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its name: the guest's id, of ours.
    pub name: String,
    /// Its number, new in each life.
    pub id: u32,
    /// Its memory, MiB.
    pub memory_mib: u64,
    /// It was paused by who made it, or on request.
    pub is_paused: bool,
    /// It stands still for good.
    pub shutdown: Option<Shutdown>,
    /// It is being taken apart.
    pub is_dying: bool,
}

/// One line: `%-40s %5d %5lu %5d     %c%c%c%c%c%c  %8.1f` (xl_list.c of Xen 4.17), the letters being running, blocked, paused, shut
/// down, why (`-rscwS`), dying.
fn parse_line(line: &str) -> Option<Domain> {
    let mut words = line.split_ascii_whitespace();
    let (name, id, memory, _vcpus, flags) =
        (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?.as_bytes());
    let [_, _, paused, shut, why, dying] = flags else { return None };
    let shutdown = (*shut == b's').then_some(match why {
        b'-' => Shutdown::PowerOff,
        b'r' => Shutdown::Reboot,
        b's' => Shutdown::Suspend,
        _ => Shutdown::Crash,
    });
    Some(Domain {
        name: name.to_owned(),
        id: id.parse().ok()?,
        memory_mib: memory.parse().ok()?,
        is_paused: *paused == b'p',
        shutdown,
        is_dying: *dying == b'd',
    })
}

/// All domains of a list but the first, which is this host.
fn parse_list(text: &str) -> Vec<Domain> {
    text.lines().skip(1).filter_map(parse_line).filter(|domain| domain.id != 0).collect()
}

/// Runs a program to its end; what it said on its standard output.
///
/// # Errors
/// When it cannot be run, fails, or takes too long (it is killed then).
pub async fn run<S: AsRef<OsStr>>(
    what: &'static str,
    budget: Duration,
    program: &OsStr,
    words: impl IntoIterator<Item = S>,
) -> BackendResult<String> {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
    let ended = timeout(budget, command.output()).await.map_err(|_| BackendError::Deadline { what, budget_ms })?;
    let output = ended.map_err(|error| BackendError::Failed { what, detail: error.to_string() })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(BackendError::Failed { what, detail: format!("{}: {}", output.status, last_words(&said)) })
}

/// The end of what a program said, on one line.
pub fn last_words(said: &str) -> String {
    let line = said.trim().replace(['\n', '\r'], " | ");
    let skip = line.chars().count().saturating_sub(MAX_WORDS);
    line.chars().skip(skip).collect()
}

/// `xl` with these words.
///
/// # Errors
/// As [`run`].
pub async fn xl<S: AsRef<OsStr>>(
    what: &'static str,
    budget: Duration,
    words: impl IntoIterator<Item = S>,
) -> BackendResult<String> {
    run(what, budget, OsStr::new("xl"), words).await
}

/// All domains but this host itself.
///
/// # Errors
/// As [`run`].
pub async fn list(budget: Duration) -> BackendResult<Vec<Domain>> {
    Ok(parse_list(&xl("list the domains", budget, ["list"]).await?))
}

/// What is read of `xl info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Xen's version up to its second part, `4.17`: that of the tools that belong to it.
    pub release: String,
    /// Its whole version, for people.
    pub version: String,
    /// The processor's features that paravirtual guests may see, as words of bits.
    pub features: String,
}

/// Reads `xl info`.
pub fn parse_info(text: &str) -> Option<Info> {
    let get = |name: &str| {
        let found = text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name));
        found.map(|(_, value)| value.trim().to_owned())
    };
    let release = format!("{}.{}", get("xen_major")?, get("xen_minor")?);
    let is_version = release.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    Some(Info { version: get("xen_version")?, features: get("hw_caps")?, release }).filter(|_| is_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0   640     1     r-----      30.4
gst-0199a7b2-0000-7000-8000-000000000001     3   128     1     -b----       5.2
gst-0199a7b2-0000-7000-8000-000000000002     4   128     1     --p---       0.0
gst-0199a7b2-0000-7000-8000-000000000003     5    64     2     ---ss-       9.9
gst-0199a7b2-0000-7000-8000-000000000004     6    64     2     ---s--       9.9
gst-0199a7b2-0000-7000-8000-000000000005     7    64     2     ---sr-       9.9
gst-0199a7b2-0000-7000-8000-000000000006     8    64     2     --psc-       9.9
(null)                                       9     0     0     --ps-d       9.9
";

    #[test]
    fn a_list_of_domains_is_read() {
        let all = parse_list(LIST);
        assert_eq!(all.iter().map(|domain| domain.id).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8, 9]);
        let shutdowns: Vec<_> = all.iter().map(|domain| domain.shutdown).collect();
        use Shutdown::{Crash, PowerOff, Reboot, Suspend};
        assert_eq!(shutdowns, [None, None, Some(Suspend), Some(PowerOff), Some(Reboot), Some(Crash), Some(PowerOff)]);
        assert_eq!(
            all.iter().map(|domain| domain.is_paused).collect::<Vec<_>>(),
            [false, true, false, false, false, true, true]
        );
        assert!(all[6].is_dying && !all[5].is_dying);
        assert_eq!(all[0].memory_mib, 128);
        for odd in ["", "Name\n", "Name\nx", "Name\nx 1 2 3 r", "Name\nx y 2 3 r----- 1"] {
            assert_eq!(parse_list(odd), [], "{odd}");
        }
    }

    #[test]
    fn what_xen_is_comes_from_its_info() {
        let text = "release                : 6.1.0\nhw_caps                : 078bf3fd:8\nxen_major              : 4\n\
                    xen_minor              : 17\nxen_version            : 4.17.7\n";
        let info = parse_info(text).unwrap();
        assert_eq!((info.release.as_str(), info.version.as_str()), ("4.17", "4.17.7"));
        assert_eq!(info.features, "078bf3fd:8");
        assert_eq!(parse_info(""), None);
        assert_eq!(parse_info(&text.replace(": 17", ": 1/7")), None);
    }

    #[tokio::test]
    async fn a_program_that_fails_or_hangs_is_told_of() {
        let sh = OsStr::new("sh");
        let budget = Duration::from_secs(30);
        assert_eq!(run("x", budget, sh, ["-c", "echo a"]).await.unwrap(), "a\n");
        let failed = run("x", budget, sh, ["-c", "echo no such domain >&2; exit 3"]).await.unwrap_err();
        assert!(failed.to_string().contains("no such domain"), "{failed}");
        let late = run("x", Duration::from_millis(50), sh, ["-c", "sleep 60"]).await.unwrap_err();
        assert!(matches!(late, BackendError::Deadline { .. }), "{late}");
    }
}
