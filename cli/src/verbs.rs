//! What verbs have in common, added to all of them in one place: `--watch` to what reads, `--dry-run` to changes that REST tries as a
//! whole, short forms, and an example to each. A test walks the whole tree.

use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory as _, value_parser};

use crate::arguments::Arguments;

/// Verbs that read what changes with time: `--watch` asks again and again.
const READS: &[&str] = &[
    "cloud list",
    "event list",
    "group list",
    "group show",
    "guest evacuations",
    "guest list",
    "guest mirrors",
    "guest placement",
    "guest reliability",
    "guest show",
    "host list",
    "host rentings",
    "host show",
    "image list",
    "image show",
    "image sites",
    "ledger",
    "link list",
    "market list",
    "market prices",
    "market verdicts",
    "migration list",
    "migration show",
    "network flows",
    "network list",
    "network ports",
    "network show",
    "operation list",
    "operation show",
    "plan list",
    "plan show",
    "project list",
    "store list",
    "token list",
    "volume history",
    "volume list",
    "volume show",
    "volume sites",
];

/// Changes that are tried by REST as they are sent: the answer is what would be. Verbs that tell more of a trial have a `--dry-run` of
/// their own.
const TRIED: &[&str] = &[
    "cloud create",
    "group create",
    "group delete",
    "group set",
    "guest checkpoint",
    "guest failover",
    "guest follow-prices",
    "guest on-loss",
    "host cordon",
    "host join-token",
    "host remove",
    "host return",
    "host uncordon",
    "image delete",
    "image import",
    "migration cancel",
    "network create",
    "network delete",
    "operation cancel",
    "plan cancel",
    "project create",
    "store sweep",
    "token create",
    "token delete",
    "volume check",
    "volume point",
];

/// Short forms.
const SHORT: &[(&str, &str)] = &[
    ("cloud", "c"),
    ("event", "e"),
    ("guest", "g"),
    ("host", "h"),
    ("image", "i"),
    ("link", "l"),
    ("market", "m"),
    ("network", "n"),
    ("operation", "o"),
    ("plan", "p"),
    ("volume", "v"),
];
const SHORT_VERBS: &[(&str, &str)] = &[("list", "ls"), ("delete", "rm"), ("remove", "rm")];

/// Examples of verbs that have none beside their options.
const EXAMPLES: &[(&str, &str)] = &[
    ("cloud create", "supercloud cloud create home\n  supercloud cloud create aws-east --provider ec2 --dry-run"),
    ("cloud list", "supercloud cloud list -o wide"),
    (
        "completion",
        "source <(supercloud completion bash)\n  supercloud completion fish > ~/.config/fish/completions/supercloud.fish",
    ),
    ("context list", "supercloud context list"),
    ("context remove", "supercloud context remove shop"),
    ("context show", "supercloud context show home"),
    ("context use", "supercloud context use shop"),
    ("event list", "supercloud event list --after 1200 -o ndjson"),
    ("event verify", "supercloud event verify      # every hash, and that none is missing"),
    ("event watch", "supercloud event watch --after 1200 -o ndjson"),
    ("group create", "supercloud group create shop web db cache"),
    ("group delete", "supercloud group delete shop"),
    (
        "group freeze",
        "supercloud group freeze shop --dry-run\n  supercloud group freeze shop --reason 'until Monday' --watch",
    ),
    ("group list", "supercloud group list -o wide"),
    (
        "group migrate",
        "supercloud group migrate shop --to gcp-west --dry-run\n  supercloud group migrate shop --to oak --watch",
    ),
    ("group set", "supercloud group set shop web db cache queue      # all that are its guests from now on"),
    ("group show", "supercloud group show shop -o json"),
    ("group thaw", "supercloud group thaw shop --to gcp-west --watch"),
    ("guest checkpoint", "supercloud guest checkpoint web\n  supercloud volume history web       # where it is shown"),
    ("guest delete", "supercloud guest delete web --dry-run\n  supercloud guest delete web --watch"),
    (
        "guest evacuations",
        "supercloud guest evacuations -o wide      # and why\n  supercloud guest evacuations --watch",
    ),
    (
        "guest follow-prices",
        "supercloud guest follow-prices web true\n  supercloud guest follow-prices web false      # no policy moves it",
    ),
    ("guest freeze", "supercloud guest freeze web --dry-run\n  supercloud guest freeze web --watch"),
    ("guest list", "supercloud guest list -o wide\n  supercloud g ls --watch --every 5"),
    ("guest mirrors", "supercloud guest mirrors web --watch"),
    ("guest placement", "supercloud guest placement web\n  supercloud guest placement web --place gcp-west"),
    ("guest show", "supercloud guest show web\n  supercloud guest show web -o json"),
    ("guest start", "supercloud guest start web --place home --watch"),
    ("guest stop", "supercloud guest stop web --watch\n  supercloud guest stop web --force --dry-run"),
    ("guest unmirror", "supercloud guest unmirror web --dry-run"),
    ("host cordon", "supercloud host cordon h3\n  supercloud plan create drain h3      # and everything off it"),
    ("host join-token", "supercloud host join-token h4 --cloud home --expires 300"),
    ("host list", "supercloud host list -o wide      # with prices\n  supercloud host list --watch"),
    ("host remove", "supercloud host remove h3 --dry-run      # what only it has\n  supercloud host remove h3"),
    ("host rentings", "supercloud host rentings --all\n  supercloud host rentings --watch"),
    ("host return", "supercloud host return h7 --dry-run\n  supercloud host return h7 --watch"),
    ("host show", "supercloud host show h3"),
    ("host uncordon", "supercloud host uncordon h3"),
    ("image delete", "supercloud image delete debian --dry-run"),
    ("image list", "supercloud image list -o wide"),
    ("image show", "supercloud image show debian"),
    ("image sites", "supercloud image sites debian"),
    (
        "ledger",
        "supercloud ledger --last 7d --by host\n  supercloud ledger --guest web -o json\n  supercloud ledger --last 1d --watch --every 60",
    ),
    ("link list", "supercloud link list -o wide      # why one is silent\n  supercloud link list --host h3 --watch"),
    ("man", "supercloud man /usr/local/share/man/man1"),
    ("market list", "supercloud market list --watch"),
    ("market prices", "supercloud market prices aws-east/m7i.large/spot"),
    ("market verdicts", "supercloud market verdicts -o wide      # and why"),
    ("migration cancel", "supercloud migration cancel opn-0192..."),
    ("migration list", "supercloud migration list --watch"),
    ("migration show", "supercloud migration show opn-0192..."),
    ("migration watch", "supercloud migration watch opn-0192..."),
    ("network create", "supercloud network create lan --cidr 10.20.0.0/24 --dns 9.9.9.9"),
    ("network delete", "supercloud network delete lan --dry-run"),
    ("network flows", "supercloud network flows web -o wide"),
    ("network list", "supercloud network list"),
    ("network ports", "supercloud network ports lan"),
    ("network show", "supercloud network show lan"),
    ("operation cancel", "supercloud operation cancel opn-0192... --dry-run"),
    ("operation list", "supercloud operation list -o wide\n  supercloud o ls --watch"),
    ("operation show", "supercloud operation show opn-0192... -o yaml"),
    ("operation watch", "supercloud operation watch opn-0192..."),
    ("plan apply", "supercloud plan apply pln-0192... --dry-run\n  supercloud plan apply pln-0192... --watch"),
    ("plan cancel", "supercloud plan cancel pln-0192..."),
    ("plan create drain", "supercloud plan create drain h3 --dry-run"),
    ("plan create evacuate", "supercloud plan create evacuate aws-east --reason price"),
    ("plan create gather", "supercloud plan create gather web db cache --to gcp-west"),
    ("plan create rebalance", "supercloud plan create rebalance --band 15 --dry-run"),
    ("plan list", "supercloud plan list --watch"),
    ("plan show", "supercloud plan show pln-0192..."),
    ("plan undo", "supercloud plan undo pln-0192... --dry-run"),
    ("plan watch", "supercloud plan watch pln-0192..."),
    ("project create", "supercloud project create shop"),
    ("project list", "supercloud project list"),
    ("store list", "supercloud store list"),
    ("store sweep", "supercloud store sweep aws-east --dry-run\n  supercloud store sweep controller"),
    ("token create", "supercloud token create ci --project-scope shop --role operator --expires 86400"),
    ("token delete", "supercloud token delete tok-0192... --dry-run"),
    ("token list", "supercloud token list"),
    ("volume check", "supercloud volume check web --megabytes-per-s 50"),
    ("volume list", "supercloud volume list -o wide"),
    ("volume point", "supercloud volume point web"),
    ("volume show", "supercloud volume show web"),
    ("volume sites", "supercloud volume sites web --watch"),
    ("whoami", "supercloud whoami --context shop"),
];

/// The whole command.
pub fn command() -> Command {
    dress(Arguments::command(), "")
}

fn dress(mut command: Command, path: &str) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|one| one.get_name().to_owned()).collect();
    for name in names {
        let below = if path.is_empty() { name.clone() } else { format!("{path} {name}") };
        command = command.mut_subcommand(&name, |one| {
            let forms = if path.is_empty() { SHORT } else { SHORT_VERBS };
            let one = match forms.iter().find(|(long, _)| *long == name) {
                Some((_, short)) => one.visible_alias(*short),
                None => one,
            };
            dress(one, &below)
        });
    }
    if READS.contains(&path) {
        command = command
            .arg(Arg::new("again").long("watch").action(ArgAction::SetTrue).help("Ask again and again, until Ctrl-C"))
            .arg(
                Arg::new("every")
                    .long("every")
                    .value_name("SECONDS")
                    .requires("again")
                    .value_parser(value_parser!(u64).range(1..=86_400))
                    .default_value("2")
                    .help("With --watch: how long to wait before it is asked again"),
            );
    }
    if TRIED.contains(&path) {
        command = command.arg(
            Arg::new("whole_trial")
                .long("dry-run")
                .action(ArgAction::SetTrue)
                .help("Say what would be done, and do nothing"),
        );
    }
    match EXAMPLES.iter().find(|(of, _)| *of == path) {
        Some((_, examples)) => command.after_help(format!("Examples:\n  {examples}")),
        None => command,
    }
}

/// What of it was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asked {
    /// Ask again and again, with so long in between.
    pub again: Option<Duration>,
    /// All changes are dry runs.
    pub is_trial: bool,
}

impl Asked {
    /// What the command line says.
    pub fn of(matches: &ArgMatches) -> Self {
        let mut leaf = matches;
        while let Some((_, below)) = leaf.subcommand() {
            leaf = below;
        }
        let is = |name: &str| leaf.try_get_one::<bool>(name).ok().flatten().copied().unwrap_or(false);
        let every = || leaf.try_get_one::<u64>("every").ok().flatten().copied().unwrap_or(2);
        Self { again: is("again").then(|| Duration::from_secs(every())), is_trial: is("whole_trial") }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Verbs that neither read what changes nor change what the controller has, and why there is nothing to watch or to try.
    const OTHERS: &[(&str, &str)] = &[
        ("api", "what is called says itself whether it is tried: ?dry_run=true"),
        ("completion", "prints a script; needs no controller"),
        ("console", "a session"),
        ("context add", "the user's own file of contexts"),
        ("context list", "the user's own file of contexts"),
        ("context show", "the user's own file of contexts"),
        ("context remove", "the user's own file of contexts"),
        ("context use", "the user's own file of contexts"),
        ("event verify", "a check that ends"),
        ("event watch", "is a watch"),
        ("explain", "prints what the program knows; needs no controller"),
        ("guest console", "a session"),
        ("image export", "writes a file that is not there yet, and changes nothing else"),
        ("man", "writes manual pages; needs no controller"),
        ("migration watch", "is a watch"),
        ("operation watch", "is a watch"),
        ("plan watch", "is a watch"),
        ("simulate", "computes; needs no controller"),
        ("top", "is a watch"),
        ("volume export", "writes a file that is not there yet, and changes nothing else"),
        ("whoami", "a token does not change"),
    ];

    fn leaves(command: &Command, path: &str, found: &mut Vec<(String, Command)>) {
        for one in command.get_subcommands().filter(|one| one.get_name() != "help") {
            let below = if path.is_empty() { one.get_name().to_owned() } else { format!("{path} {}", one.get_name()) };
            if one.has_subcommands() { leaves(one, &below, found) } else { found.push((below, one.clone())) }
        }
    }

    fn all() -> Vec<(String, Command)> {
        let mut found = Vec::new();
        leaves(&command(), "", &mut found);
        assert!(found.len() > 80, "{}", found.len());
        found
    }

    fn has(command: &Command, long: &str) -> bool {
        command.get_arguments().any(|argument| argument.get_long() == Some(long))
    }

    #[test]
    fn the_tree_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_verb_has_an_example_that_the_parser_takes() {
        let (mut told, mut wrong) = (0, Vec::new());
        for (path, verb) in all() {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            if !help.contains("Example") {
                wrong.push(format!("{path} has no example"));
            }
            for line in help.lines().map(str::trim).filter(|line| line.starts_with("supercloud ")) {
                let line = line.split(" # ").next().unwrap_or(line);
                // What the shell would do with it is not looked at.
                let ways = line
                    .split(" && ")
                    .map(|one| one.split(" | ").next().unwrap_or(one).split(" > ").next().unwrap_or(one));
                for one in ways.filter(|one| one.starts_with("supercloud ")) {
                    let one = one.replace("pln-0192...", "pln-01a1fea9-e622-75ca-b41b-c7d245b5cc2f");
                    let words = words(&one);
                    if let Err(error) = command().try_get_matches_from(&words) {
                        wrong.push(format!("{path}: {one}: {error}"));
                    }
                    told += 1;
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(told > 100, "{told}");
    }

    /// Words as a shell splits them: quotes keep together, nothing else.
    fn words(line: &str) -> Vec<String> {
        let mut found = vec![String::new()];
        let mut within = None;
        for c in line.trim().chars() {
            match (within, c) {
                (None, '\'' | '"') => within = Some(c),
                (Some(quote), c) if quote == c => within = None,
                (None, ' ') => found.push(String::new()),
                (_, c) => found.last_mut().unwrap().push(c),
            }
        }
        found.retain(|word| !word.is_empty());
        found
    }

    #[test]
    fn what_reads_can_be_watched_and_what_changes_can_be_tried() {
        let mut wrong = Vec::new();
        for (path, verb) in all() {
            let other = OTHERS.iter().any(|(of, _)| *of == path);
            let (reads, tries) = (READS.contains(&path.as_str()), has(&verb, "dry-run"));
            if [other, reads, tries].into_iter().filter(|is| *is).count() != 1 {
                wrong.push(path.clone());
            }
            assert!(!reads || has(&verb, "watch") && has(&verb, "every"), "{path}");
        }
        let say = "say in verbs.rs whether it reads (--watch), changes something (--dry-run), or why it does neither";
        assert!(wrong.is_empty(), "{say}: {}", wrong.join(", "));
    }

    #[test]
    fn the_tables_name_verbs_that_there_are_and_each_once() {
        let known: BTreeSet<String> = all().into_iter().map(|(path, _)| path).collect();
        let named = READS
            .iter()
            .chain(TRIED)
            .copied()
            .chain(OTHERS.iter().map(|(of, _)| *of))
            .chain(EXAMPLES.iter().map(|(of, _)| *of));
        for path in named {
            assert!(known.contains(path), "there is no {path}");
        }
        let examples: BTreeSet<&str> = EXAMPLES.iter().map(|(of, _)| *of).collect();
        assert_eq!(examples.len(), EXAMPLES.len());
    }

    #[test]
    fn what_was_asked_for_is_found_behind_short_forms() {
        let asked = |words: &[&str]| Asked::of(&command().get_matches_from([&["supercloud"], words].concat()));
        assert_eq!(asked(&["g", "ls"]), Asked::default());
        assert_eq!(asked(&["guest", "list", "--watch"]).again, Some(Duration::from_secs(2)));
        assert_eq!(asked(&["h", "ls", "--watch", "--every", "7"]).again, Some(Duration::from_secs(7)));
        assert!(asked(&["host", "rm", "h1", "--dry-run"]).is_trial);
        assert!(!asked(&["guest", "rm", "web", "--dry-run"]).is_trial, "it has one of its own");
    }
}
