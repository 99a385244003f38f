//! The life of a renting, pure: what may follow what, and what has to be done now.
//!
//! ```text
//!   recorded ──► asked ──► launched ──► up ──► returning ──► ended
//!      │           │           └──────────────────▲            ▲
//!      └───────────┴─────── refused, returned ──────────────────┘   (and `taken` from wherever there is a machine)
//! ```
//! `asked` is written *before* the provider is: whoever finds it after a crash looks for the token, and only when the provider
//! knows of none asks again, with the same one.

use supercloud_api::{
    Cloud, HostRent, Problem, Renting, RentingEnd, RentingState,
    ids::{HostId, OperationId, RentingId},
    unix_ms,
};
use supercloud_provider::{Instance, InstanceState};

/// A renting as it begins: ordered of a cloud by `rent_operation`, nothing asked of the provider yet.
#[must_use]
pub fn recorded(id: RentingId, cloud: &Cloud, host: HostId, wanted: &HostRent, rent_operation: OperationId) -> Renting {
    Renting {
        id,
        cloud: cloud.id,
        cloud_name: cloud.name.clone(),
        provider: cloud.provider.clone(),
        host,
        host_name: wanted.host_name.clone(),
        instance_type: wanted.instance_type.clone(),
        tenure: wanted.tenure,
        max_price_nanousd_per_hour: wanted.max_price_nanousd_per_hour,
        state: RentingState::Recorded,
        end: None,
        instance: None,
        address: None,
        is_started_by_hand: false,
        ending_as: None,
        error: None,
        rent_operation,
        return_operation: None,
        created_at_ms: unix_ms(),
        launched_at_ms: None,
        up_at_ms: None,
        ended_at_ms: None,
    }
}

/// Every step that is not from a state to itself.
pub const TRANSITIONS: &[(RentingState, RentingState)] = {
    use RentingState::{Asked, Ended, Launched, Recorded, Returning, Up};
    &[
        (Recorded, Asked),
        (Recorded, Ended),
        (Asked, Launched),
        (Asked, Returning),
        (Asked, Ended),
        (Launched, Up),
        (Launched, Returning),
        (Launched, Ended),
        (Up, Returning),
        (Up, Ended),
        (Returning, Ended),
    ]
};

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From the launch to the agent's joining.
    pub join_ms: u64,
    /// A machine that complete listings have not told of for so long is not there: listings may lag behind launches.
    pub settle_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { join_ms: 20 * 60_000, settle_ms: 5 * 60_000 }
    }
}

/// What came to be known.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The provider is about to be asked.
    Asking,
    /// It answered a launch.
    Launched {
        /// With this machine.
        instance: &'a Instance,
        /// On which somebody starts the agent.
        by_hand: bool,
    },
    /// It said no, and launched nothing.
    Refused(&'a Problem),
    /// A call failed; nothing else is known.
    Troubled(&'a Problem),
    /// A listing tells of the machine.
    Seen(&'a Instance),
    /// Complete listings have not told of it for so long.
    Unseen {
        /// For how long.
        for_ms: u64,
    },
    /// The host's agent has joined.
    Joined,
    /// Somebody wants to give it back.
    ReturnWanted,
    /// Time went on.
    Tick,
}

/// What has to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Todo {
    /// Write [`Event::Asking`], then launch.
    Ask,
    /// Look for the token; if it is certain that there is none, launch with it.
    LookThenLaunch,
    /// Look for the token, launch nothing.
    Look,
    /// End the machine.
    Terminate,
    /// Nothing.
    Nothing,
}

/// What has to be done for a renting.
#[must_use]
pub const fn todo(renting: &Renting) -> Todo {
    match (renting.state, renting.ending_as) {
        (RentingState::Recorded, None) => Todo::Ask,
        (RentingState::Asked, None) => Todo::LookThenLaunch,
        (RentingState::Asked, Some(_)) => Todo::Look,
        (RentingState::Launched | RentingState::Up, _) => Todo::Look,
        (RentingState::Returning, _) => Todo::Terminate,
        (RentingState::Recorded | RentingState::Ended, _) => Todo::Nothing,
    }
}

fn end(renting: &mut Renting, as_: RentingEnd, now_ms: u64) {
    renting.state = RentingState::Ended;
    renting.end = Some(as_);
    renting.ended_at_ms = Some(now_ms);
}

/// There is a machine: on with it, or back with it if that is wanted already.
fn take(renting: &mut Renting, instance: &Instance, by_hand: bool, now_ms: u64) {
    renting.instance = Some(instance.id.clone());
    renting.address = instance.address.map(|address| address.to_string());
    renting.is_started_by_hand = by_hand;
    renting.launched_at_ms = Some(now_ms);
    renting.error = None;
    renting.state = RentingState::Launched;
    if let Some(as_) = renting.ending_as {
        give_back(renting, as_, now_ms);
    }
}

fn give_back(renting: &mut Renting, as_: RentingEnd, now_ms: u64) {
    renting.ending_as = renting.ending_as.or(Some(as_));
    match renting.state {
        RentingState::Recorded => end(renting, as_, now_ms),
        // Nothing was launched, so nothing is to be ended.
        RentingState::Launched | RentingState::Up if renting.is_started_by_hand => end(renting, as_, now_ms),
        RentingState::Launched | RentingState::Up => renting.state = RentingState::Returning,
        // What came of the order is not known yet.
        RentingState::Asked | RentingState::Returning | RentingState::Ended => {}
    }
}

/// The renting after an event. An event that means nothing in its state changes nothing.
#[must_use]
pub fn after(renting: &Renting, event: Event<'_>, limits: &Limits, now_ms: u64) -> Renting {
    use RentingState::{Asked, Ended, Launched, Recorded, Returning, Up};
    let mut next = renting.clone();
    match (event, renting.state) {
        (_, Ended) => {}
        (Event::Asking, Recorded) => next.state = Asked,
        (Event::Launched { instance, by_hand }, Asked) => take(&mut next, instance, by_hand, now_ms),
        (Event::Refused(problem), Asked) => {
            next.error = Some(problem.clone());
            end(&mut next, renting.ending_as.unwrap_or(RentingEnd::Refused), now_ms);
        }
        (Event::Troubled(problem), _) => next.error = Some(problem.clone()),
        (Event::Seen(instance), Asked) if instance.state.may_cost() => take(&mut next, instance, false, now_ms),
        (Event::Seen(instance), _) if instance.state == InstanceState::Gone => {
            next.instance = Some(instance.id.clone());
            end(&mut next, renting.ending_as.unwrap_or(RentingEnd::Taken), now_ms);
        }
        (Event::Seen(instance), Launched | Up) => {
            next.address = instance.address.map(|address| address.to_string()).or(next.address);
        }
        (Event::Unseen { for_ms }, Asked) if for_ms >= limits.settle_ms => {
            // Without a wish to end it, it is asked for again.
            if let Some(as_) = renting.ending_as {
                end(&mut next, as_, now_ms);
            }
        }
        (Event::Unseen { for_ms }, Launched | Up | Returning)
            if for_ms >= limits.settle_ms && !renting.is_started_by_hand =>
        {
            end(&mut next, renting.ending_as.unwrap_or(RentingEnd::Taken), now_ms);
        }
        (Event::Joined, Launched) => {
            next.state = Up;
            next.up_at_ms = Some(now_ms);
            next.error = None;
        }
        (Event::ReturnWanted, _) => give_back(&mut next, RentingEnd::Returned, now_ms),
        (Event::Tick, Launched) if !renting.is_started_by_hand => {
            let since_ms = renting.launched_at_ms.map_or(0, |at| now_ms.saturating_sub(at));
            if since_ms > limits.join_ms {
                give_back(&mut next, RentingEnd::NeverJoined, now_ms);
            }
        }
        _ => {}
    }
    next
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use supercloud_api::{Code, Tenure, ids::CloudId};
    use supercloud_provider::FaultDomains;

    use super::*;

    fn renting() -> Renting {
        let name = "c".parse().unwrap();
        let cloud = Cloud { id: CloudId::generate(), name, provider: "p".into(), created_at_ms: 0 };
        let wanted = HostRent {
            host_name: "h".parse().unwrap(),
            instance_type: "m".into(),
            tenure: Tenure::Spot,
            max_price_nanousd_per_hour: None,
        };
        recorded(RentingId::generate(), &cloud, HostId::generate(), &wanted, OperationId::generate())
    }

    fn instance(state: InstanceState) -> Instance {
        Instance {
            id: "i-1".into(),
            token: "t".into(),
            state,
            instance_type: "m".into(),
            tenure: Tenure::Spot,
            address: None,
            launched_at_ms: None,
            domains: FaultDomains::default(),
        }
    }

    const LIMITS: Limits = Limits { join_ms: 1000, settle_ms: 100 };

    fn event(number: u8, problem: &Problem, instance: &Instance, for_ms: u64) -> Event<'static> {
        // Leaked: a few small values per test.
        let (problem, instance): (&'static Problem, &'static Instance) =
            (Box::leak(Box::new(problem.clone())), Box::leak(Box::new(instance.clone())));
        match number {
            0 => Event::Asking,
            1 => Event::Launched { instance, by_hand: false },
            2 => Event::Refused(problem),
            3 => Event::Troubled(problem),
            4 => Event::Seen(instance),
            5 => Event::Unseen { for_ms },
            6 => Event::Joined,
            7 => Event::ReturnWanted,
            _ => Event::Tick,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn states_follow_each_other_as_the_table_says_and_an_end_is_for_ever(
            steps in proptest::collection::vec((0u8..9, 0usize..4, 0u64..300), 0..40)
        ) {
            let problem = Problem::new(Code::NoCapacity, "x");
            let states = [InstanceState::Starting, InstanceState::Running, InstanceState::Ending, InstanceState::Gone];
            let (mut now, mut at_ms) = (renting(), 0);
            for (number, state, ms) in steps {
                at_ms += ms;
                let next = after(&now, event(number, &problem, &instance(states[state]), ms), &LIMITS, at_ms);
                let is_step = next.state == now.state || TRANSITIONS.contains(&(now.state, next.state));
                prop_assert!(is_step, "{:?} to {:?}", now.state, next.state);
                prop_assert_eq!(next.state == RentingState::Ended, next.end.is_some() && next.ended_at_ms.is_some());
                // Only what is certain not to cost ends: a known machine needs the provider's word, or its silence for long.
                if next.end.is_some() && now.end.is_none() && now.instance.is_some() {
                    let is_certain = match event(number, &problem, &instance(states[state]), ms) {
                        Event::Seen(seen) => seen.state == InstanceState::Gone,
                        Event::Unseen { for_ms } => for_ms >= LIMITS.settle_ms,
                        _ => false,
                    };
                    prop_assert!(is_certain, "{now:?} ended");
                }
                now = next;
            }
            // Whoever wants to give it back gets there, wherever it was, once the provider says that it is gone.
            let next = after(&now, Event::ReturnWanted, &LIMITS, at_ms);
            let next = after(&next, Event::Seen(&instance(InstanceState::Gone)), &LIMITS, at_ms);
            prop_assert_eq!(next.state, RentingState::Ended);
            prop_assert_eq!(todo(&next), Todo::Nothing);
        }
    }

    #[test]
    fn a_wish_to_return_while_the_provider_is_asked_waits_for_what_comes_of_it() {
        let asked = after(&renting(), Event::Asking, &LIMITS, 0);
        let wanted = after(&asked, Event::ReturnWanted, &LIMITS, 0);
        assert_eq!((wanted.state, todo(&wanted)), (RentingState::Asked, Todo::Look));
        // Listings lag behind: one that does not tell of it proves nothing.
        let unseen = after(&wanted, Event::Unseen { for_ms: 99 }, &LIMITS, 0);
        assert_eq!(unseen.state, RentingState::Asked);
        assert_eq!(after(&wanted, Event::Unseen { for_ms: 100 }, &LIMITS, 0).end, Some(RentingEnd::Returned));
        let launched = after(&wanted, Event::Seen(&instance(InstanceState::Running)), &LIMITS, 0);
        assert_eq!((launched.state, todo(&launched)), (RentingState::Returning, Todo::Terminate));
    }

    #[test]
    fn a_machine_whose_agent_never_joins_goes_back() {
        let asked = after(&renting(), Event::Asking, &LIMITS, 0);
        let running = instance(InstanceState::Running);
        let launched = after(&asked, Event::Launched { instance: &running, by_hand: false }, &LIMITS, 10);
        assert_eq!(after(&launched, Event::Tick, &LIMITS, 1010).state, RentingState::Launched);
        let late = after(&launched, Event::Tick, &LIMITS, 1011);
        assert_eq!((late.state, todo(&late)), (RentingState::Returning, Todo::Terminate));
        let gone = after(&late, Event::Seen(&instance(InstanceState::Gone)), &LIMITS, 1012);
        assert_eq!(gone.end, Some(RentingEnd::NeverJoined));
        // Own machines cost nothing more while somebody walks over to them.
        let own = after(&asked, Event::Launched { instance: &running, by_hand: true }, &LIMITS, 10);
        assert_eq!(after(&own, Event::Tick, &LIMITS, 1_000_000).state, RentingState::Launched);
        assert_eq!(after(&own, Event::ReturnWanted, &LIMITS, 11).end, Some(RentingEnd::Returned));
    }
}
