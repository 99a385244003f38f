//! What is killed, and when; what may come of it. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use supercloud_api::Phase;

/// What dies, or is cut, while a guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The agent of the host that the guest leaves.
    SourceAgent,
    /// The agent of the host that it goes to.
    DestinationAgent,
    /// The volume process at the source.
    SourceVolume,
    /// The volume process at the destination.
    DestinationVolume,
    /// The controller.
    Controller,
    /// libvirtd of the source.
    SourceLibvirtd,
    /// libvirtd of the destination.
    DestinationLibvirtd,
    /// The hypervisor process that receives the guest.
    DestinationQemu,
    /// The link between the two hosts, which heals later.
    Wan,
}

impl Victim {
    /// All of them with their names.
    pub const ALL: [(Self, &'static str); 9] = [
        (Self::SourceAgent, "source-agent"),
        (Self::DestinationAgent, "destination-agent"),
        (Self::SourceVolume, "source-volume"),
        (Self::DestinationVolume, "destination-volume"),
        (Self::Controller, "controller"),
        (Self::SourceLibvirtd, "source-libvirtd"),
        (Self::DestinationLibvirtd, "destination-libvirtd"),
        (Self::DestinationQemu, "destination-qemu"),
        (Self::Wan, "wan"),
    ];
}

/// When it dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The destination prepares.
    Prepare,
    /// Memory travels.
    Copy,
    /// The guest is paused, and the destination cannot ask for the switch: its way to the controller is cut until after
    /// the blow.
    BeforeSwitch,
    /// The switch was granted a moment ago.
    AfterSwitch,
    /// The guest runs at its destination; blocks may be missing, the source is not released.
    Finish,
    /// So long after the request, wherever that is.
    After(Duration),
}

impl Moment {
    /// Those that are found by looking, with their names.
    pub const NAMED: [(Self, &'static str); 5] = [
        (Self::Prepare, "prepare"),
        (Self::Copy, "copy"),
        (Self::BeforeSwitch, "before-switch"),
        (Self::AfterSwitch, "after-switch"),
        (Self::Finish, "finish"),
    ];
}

/// One failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// When.
    pub moment: Moment,
    /// What.
    pub victim: Victim,
}

impl Case {
    /// Whether it makes sense: what the move is made of must be there, and not be the one copy of the guest.
    pub fn is_possible(self) -> bool {
        match self.victim {
            // Before the copy there is none; after the switch it *is* the guest. And what asks for the switch is on its way as
            // soon as all is there, through a cut link too: it may be granted to what has died meanwhile (docs/failures.md).
            Victim::DestinationQemu => self.moment == Moment::Copy,
            _ => true,
        }
    }

    /// Every failure at every named moment.
    pub fn all() -> impl Iterator<Item = Self> {
        let pairs = |(moment, _)| Victim::ALL.into_iter().map(move |(victim, _)| Self { moment, victim });
        Moment::NAMED.into_iter().flat_map(pairs).filter(|case| case.is_possible())
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let victim = Victim::ALL.iter().find(|(victim, _)| *victim == self.victim).map_or("?", |(_, name)| name);
        match self.moment {
            Moment::After(time) => write!(f, "+{}ms/{victim}", time.as_millis()),
            named => {
                let moment = Moment::NAMED.iter().find(|(moment, _)| *moment == named).map_or("?", |(_, name)| name);
                write!(f, "{moment}/{victim}")
            }
        }
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (moment, victim) = text.split_once('/')?;
            let victim = Victim::ALL.iter().find(|(_, name)| *name == victim)?.0;
            let moment = match moment.strip_prefix('+').and_then(|rest| rest.strip_suffix("ms")) {
                Some(ms) => Moment::After(Duration::from_millis(ms.parse().ok()?)),
                None => Moment::NAMED.iter().find(|(_, name)| *name == moment)?.0,
            };
            Some(Self { moment, victim })
        };
        parse().ok_or_else(|| format!("'{text}' is no case: MOMENT/VICTIM"))
    }
}

/// Whether the commit point is behind.
pub fn is_committed(phase: Phase) -> bool {
    matches!(phase, Phase::Resume | Phase::Finish | Phase::Done)
}

/// Where a guest is: host and epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// The host.
    pub host: String,
    /// The epoch.
    pub epoch: u64,
}

/// What is wrong with the way in which a move ended, by the phase that had been seen when the blow fell.
pub fn judge_end(seen: Phase, ended: Phase, before: &Seat, after: &Seat, destination: &str) -> Result<(), String> {
    let moved = Seat { host: destination.to_owned(), epoch: before.epoch + 1 };
    match ended {
        Phase::Done if *after == moved => Ok(()),
        Phase::RolledBack if is_committed(seen) => {
            Err(format!("the switch had been granted (phase {seen:?}), yet the move was rolled back"))
        }
        Phase::RolledBack if after == before => Ok(()),
        Phase::Done | Phase::RolledBack => {
            Err(format!("it ended as {ended:?}, but the guest was at {before:?} and is at {after:?}"))
        }
        other => Err(format!("it ended as {other:?}")),
    }
}

/// A small generator for soak runs (SplitMix64, Steele, Lea and Flood 2014): the same seed gives the same run.
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// A failure at any time within a move that takes `usual_ms`.
    pub fn case(&mut self, usual_ms: u64) -> Case {
        let moment = Moment::After(Duration::from_millis(self.below(usual_ms + usual_ms / 8)));
        // Whether the receiving process is the guest by then is not known beforehand.
        let victims: Vec<_> =
            Victim::ALL.iter().map(|(victim, _)| *victim).filter(|victim| *victim != Victim::DestinationQemu).collect();
        let at = usize::try_from(self.below(victims.len() as u64)).unwrap_or(0);
        Case { moment, victim: victims[at] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_written_as_they_are_read() {
        for case in Case::all().chain((0..20).map(|seed| Dice(seed).case(9000))) {
            assert_eq!(case.to_string().parse(), Ok(case));
        }
        assert!("copy".parse::<Case>().is_err() && "copy/moon".parse::<Case>().is_err());
        assert_eq!(Case::all().count(), 5 * 8 + 1);
    }

    #[test]
    fn an_end_that_is_not_true_is_found() {
        let seat = |host: &str, epoch| Seat { host: host.to_owned(), epoch };
        let (a, b) = (seat("a", 3), seat("b", 4));
        assert_eq!(judge_end(Phase::Finish, Phase::Done, &a, &b, "b"), Ok(()));
        assert_eq!(judge_end(Phase::Switch, Phase::Done, &a, &b, "b"), Ok(()));
        assert_eq!(judge_end(Phase::Switch, Phase::RolledBack, &a, &a, "b"), Ok(()));
        for (seen, ended, after) in [
            // Said to be there, and is not.
            (Phase::Switch, Phase::Done, &a),
            (Phase::Switch, Phase::RolledBack, &b),
            // Back after the commit point.
            (Phase::Resume, Phase::RolledBack, &a),
            // Without a switch.
            (Phase::Copy, Phase::Done, &seat("b", 3)),
            (Phase::Copy, Phase::RolledBack, &seat("a", 4)),
            // No end, or a bad one.
            (Phase::Copy, Phase::Failed, &a),
            (Phase::Copy, Phase::Finish, &b),
        ] {
            assert!(judge_end(seen, ended, &a, after, "b").is_err(), "{seen:?} {ended:?} {after:?}");
        }
    }
}
