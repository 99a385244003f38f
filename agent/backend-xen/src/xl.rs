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

/// A domain, as `xl list -v` tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its number, new in each life.
    pub id: u32,
    /// Its UUID in lower case: the guest's id, of ours. It stays through lives and moves.
    pub uuid: String,
    /// Its memory, MiB.
    pub memory_mib: u64,
    /// It was paused by who made it, or on request.
    pub is_paused: bool,
    /// It stands still for good.
    pub shutdown: Option<Shutdown>,
    /// It is being taken apart.
    pub is_dying: bool,
}

/// One line: `%-40s %5d %5lu %5d     %c%c%c%c%c%c  %8.1f UUID %8s %16s` (xl_list.c of Xen 4.17), the letters being running, blocked,
/// paused, shut down, why (`-rscwS`), dying. Read from its end, for a name may be anything.
fn parse_line(line: &str) -> Option<Domain> {
    let mut words = line.split_ascii_whitespace().rev();
    let (_label, _reason, uuid, _time) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let (flags, _vcpus, memory, id) = (words.next()?.as_bytes(), words.next()?, words.next()?, words.next()?);
    words.next()?;
    let [running, blocked, paused, shut, why, dying] = flags else { return None };
    let known: [(u8, &[u8]); 6] =
        [(*running, b"r-"), (*blocked, b"b-"), (*paused, b"p-"), (*shut, b"s-"), (*why, b"-rscwS?"), (*dying, b"d-")];
    let is_uuid = uuid.len() == 36
        && uuid.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    if !is_uuid || !known.iter().all(|(letter, all)| all.contains(letter)) {
        return None;
    }
    let shutdown = (*shut == b's').then_some(match why {
        b'-' => Shutdown::PowerOff,
        b'r' => Shutdown::Reboot,
        b's' => Shutdown::Suspend,
        _ => Shutdown::Crash,
    });
    Some(Domain {
        id: id.parse().ok()?,
        uuid: uuid.to_ascii_lowercase(),
        memory_mib: memory.parse().ok()?,
        is_paused: *paused == b'p',
        shutdown,
        is_dying: *dying == b'd',
    })
}

/// All domains of a list. A line that is not understood makes the whole list doubtful.
fn parse_lines(text: &str) -> Result<Vec<Domain>, String> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    match lines.next() {
        Some(head) if head.starts_with("Name ") && head.contains("UUID") => {}
        other => return Err(format!("a list of domains begins with '{}'", cut(other.unwrap_or_default()))),
    }
    lines.map(|line| parse_line(line).ok_or_else(|| format!("a list of domains says '{}'", cut(line)))).collect()
}

/// Likewise, without the first domain, which is this host and must be in it.
fn parse_list(text: &str) -> Result<Vec<Domain>, String> {
    let mut all = parse_lines(text)?;
    let count = all.len();
    all.retain(|domain| domain.id != 0);
    if all.len() + 1 == count { Ok(all) } else { Err("a list of domains is without this host itself".to_owned()) }
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

/// The one of a UUID; one that is being taken apart only when there is no other.
///
/// # Errors
/// When two that are whole have it.
pub fn pick<'a>(all: &'a [Domain], uuid: &str) -> Result<Option<&'a Domain>, String> {
    let same = || all.iter().filter(|domain| domain.uuid == uuid);
    let mut whole = same().filter(|domain| !domain.is_dying);
    let found = whole.next();
    match whole.next() {
        Some(other) => Err(format!("domains {} and {} have one UUID", found.map_or(0, |one| one.id), other.id)),
        None => Ok(found.or_else(|| same().next())),
    }
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
/// As [`run`], and when what it says is not a whole list.
pub async fn list(budget: Duration) -> BackendResult<Vec<Domain>> {
    let what = "list the domains";
    let text = xl(what, budget, ["list", "-v"]).await?;
    parse_list(&text).map_err(|detail| BackendError::Failed { what, detail })
}

/// Whether words of `xl`'s say that there is no such domain, in so many words.
fn says_gone(words: &str) -> bool {
    ["does not exist", "is an invalid domain identifier"].into_iter().any(|phrase| words.contains(phrase))
}

/// The domain of a number, if there is one. That there is none must be said, not only left out.
///
/// # Errors
/// When it cannot be said.
pub async fn domain(id: u32, budget: Duration) -> BackendResult<Option<Domain>> {
    let what = "look for a domain";
    match xl(what, budget, ["list", "-v", &id.to_string()]).await {
        Ok(text) => {
            let found = parse_lines(&text).map_err(|detail| BackendError::Failed { what, detail })?;
            let found = found.into_iter().find(|domain| domain.id == id);
            let missing = || BackendError::Failed { what, detail: format!("a list of domain {id} is without it") };
            found.ok_or_else(missing).map(Some)
        }
        Err(BackendError::Failed { detail, .. }) if says_gone(&detail) => Ok(None),
        Err(error) => Err(error),
    }
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

    const LIST: &str = "Name                                        ID   Mem VCPUs\tState\tTime(s)   UUID                            Reason-Code\tSecurity Label
Domain-0                                     0   640     1     r-----      30.4 00000000-0000-0000-0000-000000000000        -                -
gst-0199a7b2-0000-7000-8000-000000000001     3   128     1     -b----       5.2 0199a7b2-0000-7000-8000-000000000001        -                -
a name                                       4   128     1     --p---       0.0 0199A7B2-0000-7000-8000-000000000002        -                -
gst-0199a7b2-0000-7000-8000-000000000003     5    64     2     ---ss-       9.9 0199a7b2-0000-7000-8000-000000000003        2                -
gst-0199a7b2-0000-7000-8000-000000000004     6    64     2     ---s--       9.9 0199a7b2-0000-7000-8000-000000000004        0                -
gst-0199a7b2-0000-7000-8000-000000000005     7    64     2     ---sr-       9.9 0199a7b2-0000-7000-8000-000000000005        1                -
gst-0199a7b2-0000-7000-8000-000000000006     8    64     2     --psc-       9.9 0199a7b2-0000-7000-8000-000000000006        3                -
(null)                                       9     0     0     --ps-d       9.9 0199a7b2-0000-7000-8000-000000000001        0                -
";

    #[test]
    fn a_list_of_domains_is_read() {
        let all = parse_list(LIST).unwrap();
        assert_eq!(all.iter().map(|domain| domain.id).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8, 9]);
        let shutdowns: Vec<_> = all.iter().map(|domain| domain.shutdown).collect();
        use Shutdown::{Crash, PowerOff, Reboot, Suspend};
        assert_eq!(shutdowns, [None, None, Some(Suspend), Some(PowerOff), Some(Reboot), Some(Crash), Some(PowerOff)]);
        assert_eq!(
            all.iter().map(|domain| domain.is_paused).collect::<Vec<_>>(),
            [false, true, false, false, false, true, true]
        );
        assert!(all[6].is_dying && !all[5].is_dying);
        assert_eq!((all[0].memory_mib, all[1].uuid.as_str()), (128, "0199a7b2-0000-7000-8000-000000000002"));
    }

    #[test]
    fn a_doubtful_list_is_an_error_and_not_an_empty_one() {
        for odd in ["", "\n", "Name\n", "Error: no\n", LIST.lines().next().unwrap()] {
            assert!(parse_list(odd).is_err(), "{odd}");
        }
        let without_host: Vec<&str> = LIST.lines().filter(|line| !line.starts_with("Domain-0")).collect();
        assert!(parse_list(&without_host.join("\n")).is_err());
        // Cut off anywhere but at the end of a line, or with a letter of another kind, it is no list.
        for end in 1..LIST.trim_end().len() {
            let is_line = LIST.as_bytes()[end - 1..=end].contains(&b'\n');
            let has_host = LIST[..end].contains("00000000-0000-0000-0000-000000000000        -                -");
            assert_eq!(parse_list(&LIST[..end]).is_ok(), is_line && has_host, "{}", &LIST[..end]);
        }
        for (from, to) in
            [("-b----", "-x----"), ("-b----", "-b---"), ("    3   128", "   -3   128"), ("   128 ", "   1e8 ")]
        {
            assert!(parse_list(&LIST.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn a_domain_is_picked_by_its_uuid_and_a_dying_one_last() {
        let all = parse_list(LIST).unwrap();
        let found = |all: &[Domain], last: &str| {
            pick(all, &format!("0199a7b2-0000-7000-8000-00000000000{last}")).map(|found| found.map(|domain| domain.id))
        };
        assert_eq!(found(&all, "1"), Ok(Some(3)));
        assert_eq!(found(&all[1..], "1"), Ok(Some(9)));
        assert_eq!(found(&all, "7"), Ok(None));
        let twice = [all[0].clone(), Domain { id: 12, ..all[0].clone() }];
        assert!(found(&twice, "1").is_err());
    }

    #[test]
    fn only_so_many_words_say_that_a_domain_is_gone() {
        assert!(says_gone("exit status: 1: Error: Domain '7' does not exist."));
        assert!(says_gone("exit status: 2: 7 is an invalid domain identifier (rc=-6)"));
        for other in ["", "libxl_domain_info failed (code -3).", "cannot open the hypervisor's interface", "signal: 9"]
        {
            assert!(!says_gone(other), "{other}");
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
