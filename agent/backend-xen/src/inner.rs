//! What the back end's tasks share: its guests, their domains, and what is done when they come and go.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult, CompatClass, Launch,
    backend::{BackendEvent, GuestEvent, GuestInfo, RunState, StopReason},
    home::Home,
};
use supercloud_ids::GuestId;
use tokio::{
    sync::{OwnedMutexGuard, broadcast},
    time::{Instant, sleep},
};

use crate::{
    XenConfig, card, domain,
    guest::{Guest, Record, Role, blocking, run_state, words},
    turn, xl,
};

/// How long a program that sends a guest may take to end once nobody takes what it sends: a domain has a minute to suspend.
const SENDER_BUDGET: Duration = Duration::from_secs(90);
/// How often a domain that is being taken apart is looked at.
const DYING_POLL: Duration = Duration::from_millis(200);

/// See the head of this file.
pub struct Inner {
    pub config: XenConfig,
    pub class: CompatClass,
    /// Of the hypervisor, for people.
    pub version: String,
    /// libxl's name.
    pub library: String,
    /// Why guests cannot move live here, if so: the hypervisor does not note which pages a guest writes.
    pub no_live: Option<String>,
    pub guests: Mutex<BTreeMap<GuestId, Arc<Guest>>>,
    /// Records that cannot be read: such guests may well run.
    pub unreadable: Vec<GuestId>,
    pub events: broadcast::Sender<BackendEvent>,
}

/// Held by who changes something about a guest's domain.
pub type Work = OwnedMutexGuard<()>;

/// A domain of such a UUID; one that is being taken apart is as good as gone.
fn stray(all: &[xl::Domain], is_such: impl Fn(&str) -> bool) -> Option<&xl::Domain> {
    all.iter().find(|domain| !domain.is_dying && is_such(&domain.uuid))
}

/// Whether a UUID may be a guest's id: those are of version 7. Xen's tools make others, of version 4, for domains made by hand.
fn is_of_a_guest(uuid: &str) -> bool {
    uuid.as_bytes().get(14) == Some(&b'7')
}

impl Inner {
    fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, Arc<Guest>>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All guests that are here.
    ///
    /// # Errors
    /// When it cannot be said which.
    pub fn all(&self) -> BackendResult<Vec<Arc<Guest>>> {
        match self.unreadable.first() {
            Some(guest) => Err(self.cannot_say(*guest)),
            None => Ok(self.known()),
        }
    }

    /// Those of which something is known.
    pub fn known(&self) -> Vec<Arc<Guest>> {
        self.guests().values().cloned().collect()
    }

    fn cannot_say(&self, guest: GuestId) -> BackendError {
        let detail = format!("the record of {guest} in {} cannot be read", self.config.run_dir.display());
        BackendError::Failed { what: "find a guest", detail }
    }

    /// A guest that is here.
    ///
    /// # Errors
    /// When nobody can say.
    pub fn guest(&self, id: GuestId) -> BackendResult<Option<Arc<Guest>>> {
        if self.unreadable.contains(&id) {
            return Err(self.cannot_say(id));
        }
        Ok(self.guests().get(&id).cloned())
    }

    /// Likewise, once it is as it shall be. That a guest without a record is not here is Xen's to say.
    ///
    /// # Errors
    /// As [`Self::guest`], when that takes too long, and when there is a domain of a guest without a record.
    pub async fn settled(&self, id: GuestId) -> BackendResult<Option<Arc<Guest>>> {
        if let Some(guest) = self.guest(id)? {
            guest.until_settled(self.config.call_budget).await?;
        }
        // It may have turned out to be none.
        if let Some(guest) = self.guest(id)? {
            return Ok(Some(guest));
        }
        let all = xl::list(self.config.call_budget).await?;
        // It may have come meanwhile.
        match (self.guest(id)?, stray(&all, |uuid| uuid == id.uuid().to_string())) {
            (Some(guest), _) => Ok(Some(guest)),
            (None, None) => Ok(None),
            (None, Some(domain)) => Err(self.is_stray(domain)),
        }
    }

    /// Refuses a list with a domain that looks like a guest's and is none of those, nor of those that have come since.
    ///
    /// # Errors
    /// When there is one.
    pub fn check_strays(&self, all: &[xl::Domain], guests: &[Arc<Guest>]) -> BackendResult<()> {
        let known: BTreeSet<_> = guests.iter().chain(&self.known()).map(|guest| guest.uuid()).collect();
        match stray(all, |uuid| is_of_a_guest(uuid) && !known.contains(uuid)) {
            Some(domain) => Err(self.is_stray(domain)),
            None => Ok(()),
        }
    }

    fn is_stray(&self, domain: &xl::Domain) -> BackendError {
        let detail = format!(
            "domain {} (UUID {}) is there, and {} has no record of it; once nobody needs it, `xl destroy {0}` ends it",
            domain.id,
            domain.uuid,
            self.config.run_dir.display()
        );
        BackendError::Failed { what: "find a guest", detail }
    }

    /// Its domain, if it has one: the one of its UUID. That one whose number is known is gone is asked for by that number, and has to be
    /// said: being left out of one listing is not enough.
    ///
    /// # Errors
    /// When it cannot be said.
    pub async fn domain(&self, guest: &Guest) -> BackendResult<Option<xl::Domain>> {
        let all = xl::list(self.config.call_budget).await?;
        self.domain_of(guest, &all).await
    }

    /// Likewise, by a list that was made before.
    ///
    /// # Errors
    /// When it cannot be said.
    pub async fn domain_of(&self, guest: &Guest, all: &[xl::Domain]) -> BackendResult<Option<xl::Domain>> {
        let what = "find a guest's domain";
        let uuid = guest.uuid();
        let found = xl::pick(all, &uuid).map_err(|detail| BackendError::Failed { what, detail })?;
        if let Some(found) = found {
            return Ok(Some(found.clone()));
        }
        let Some(id) = guest.record().domain else { return Ok(None) };
        match xl::domain(id, self.config.call_budget).await? {
            Some(domain) if domain.uuid == uuid => {
                let detail = format!("domain {id} is there, and in a list of all it is not");
                Err(BackendError::Failed { what, detail })
            }
            // None of this number, or one of somebody else's by now.
            _ => Ok(None),
        }
    }

    /// How it is; `None`: it is gone.
    ///
    /// # Errors
    /// When it cannot be said.
    pub async fn state(&self, guest: &Guest) -> BackendResult<Option<RunState>> {
        let domain = self.domain(guest).await?;
        Ok(run_state(domain.as_ref(), &guest.record().role))
    }

    /// The guest, with its state.
    ///
    /// # Errors
    /// When it is not here, or it cannot be said.
    pub async fn expect(&self, id: GuestId) -> BackendResult<(Arc<Guest>, RunState)> {
        let missing = || BackendError::NoSuchGuest { guest: id };
        let guest = self.settled(id).await?.ok_or_else(missing)?;
        let state = self.state(&guest).await?.ok_or_else(missing)?;
        Ok((guest, state))
    }

    pub async fn info(&self, guest: &Guest) -> BackendResult<GuestInfo> {
        let state = self.state(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        Ok(GuestInfo { guest: guest.id(), epoch: guest.record().epoch, state, pid: None })
    }

    /// The number of its domain, which runs.
    ///
    /// # Errors
    /// When it does not.
    pub async fn running_domain(&self, guest: &Guest, wants: &'static str) -> BackendResult<u32> {
        let id = guest.id();
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: id })?;
        match run_state(Some(&domain), &guest.record().role) {
            Some(RunState::Running) => Ok(domain.id),
            Some(state) => Err(BackendError::WrongState { guest: id, wants, is: words(state) }),
            None => Err(BackendError::NoSuchGuest { guest: id }),
        }
    }

    pub fn tell(&self, guest: GuestId, what: GuestEvent) {
        // Nobody may be listening.
        let _ = self.events.send(BackendEvent::Guest { guest, what });
    }

    /// The file of its domain's configuration.
    pub fn domain_file(&self, guest: &Guest) -> PathBuf {
        guest.home.folder.join("domain.cfg")
    }

    /// Makes a guest's folder, its record and its disks; no domain yet. Nobody else works on it as long as what comes with it is held.
    ///
    /// # Errors
    /// When it cannot be made, or is here already; nothing of it is left then.
    pub async fn take_in(&self, launch: Launch, role: Role) -> BackendResult<(Arc<Guest>, Work)> {
        domain::check(&launch, &self.class)?;
        let id = launch.guest;
        // Refused by name when it is here, and nobody can say how.
        self.guest(id)?;
        let home = Home::new(&self.config.run_dir, id);
        let record = Record { epoch: launch.epoch, launch, role, domain: None, sender: None };
        let guest = Arc::new(Guest::new(home, record, true));
        let work = Arc::clone(&guest.work).lock_owned().await;
        match self.guests().entry(id) {
            std::collections::btree_map::Entry::Occupied(_) => return Err(BackendError::AlreadyThere { guest: id }),
            std::collections::btree_map::Entry::Vacant(place) => drop(place.insert(Arc::clone(&guest))),
        }
        let (home, record) = (guest.home.clone(), guest.record());
        let made = async {
            blocking("make a guest's folder", move || {
                home.make()?;
                home.begin()?;
                // Before there is anything that somebody would have to find again.
                home.write(&record)
            })
            .await?;
            // One that nobody knows of would be a second copy.
            if let Some(domain) = self.domain(&guest).await? {
                let detail = format!("domain {} has its UUID, and is not of this agent's", domain.id);
                return Err(BackendError::Failed { what: "make a guest", detail });
            }
            let devices = guest.open_disks(true).await?;
            let text = domain::render(&guest.record().launch, &devices, &self.config.program);
            let file = self.domain_file(&guest);
            blocking("write a domain's configuration", move || std::fs::write(file, text)).await
        };
        if let Err(error) = made.await {
            // There is no domain yet.
            if let Err(more) = self.forget(&guest).await {
                tracing::warn!(guest = %id, error = %more, "what there is of a guest that was not made cannot be removed");
            }
            return Err(error);
        }
        Ok((guest, work))
    }

    /// Removes what there is of a guest without a domain.
    async fn forget(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let ended = guest.release_disks().await;
        let home = guest.home.clone();
        blocking("remove a guest's folder", move || home.remove()).await?;
        self.guests().remove(&guest.id());
        guest.end_console();
        ended
    }

    /// Notes its domain, and serves its console.
    ///
    /// # Errors
    /// When there is none.
    pub async fn adopt_domain(&self, guest: &Arc<Guest>) -> BackendResult<u32> {
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        guest.is_domain(Some(domain.id)).await?;
        guest.serve_console(domain.id, self.config.call_budget);
        Ok(domain.id)
    }

    /// Puts in place what a domain needs that has come, and says so; it stands still yet. The caller holds its work.
    ///
    /// # Errors
    /// When something is not there.
    pub async fn settle_in(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let domain = self.adopt_domain(guest).await?;
        card::plug(&guest.record().launch, domain, self.config.call_budget).await?;
        guest.mark(Role::Arrived).await
    }

    /// Waits until no program sends it or lets it run on; one that does not end by itself is ended. Its domain is left as it is.
    ///
    /// # Errors
    /// When somebody still has it in hand.
    pub async fn until_alone(&self, guest: &Guest) -> BackendResult<()> {
        let what = "wait for the program that sends a guest";
        let file = guest.lock_file();
        let free = move |budget| {
            let file = file.clone();
            blocking(what, move || match turn::until_free(&file, budget) {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
                Err(error) => Err(error),
            })
        };
        if free(SENDER_BUDGET).await? {
            return Ok(());
        }
        if let Some(sender) = guest.record().sender {
            sender.end().await;
        }
        let budget_ms = u64::try_from(SENDER_BUDGET.as_millis()).unwrap_or(u64::MAX);
        if free(SENDER_BUDGET).await? { Ok(()) } else { Err(BackendError::Deadline { what, budget_ms }) }
    }

    /// Lets a suspended domain run on here. The caller holds its work and has seen that it is suspended.
    ///
    /// # Errors
    /// When libxl refuses, as it does for a domain that is not suspended any more.
    pub async fn run_on(&self, guest: &Guest) -> BackendResult<()> {
        self.until_alone(guest).await?;
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        if domain.shutdown != Some(xl::Shutdown::Suspend) {
            return Ok(());
        }
        let mut line = vec![self.library.clone().into(), guest.lock_file().into_os_string()];
        line.extend(["resume".into(), domain.id.to_string().into()]);
        let what = "let a suspended domain run on";
        xl::run(what, self.config.domain_budget, self.config.program.as_os_str(), line).await.map(drop)
    }

    /// Ends its domain, if it has one, and waits until it is gone or only waits for its last pages. The caller holds its work.
    ///
    /// # Errors
    /// When it is still there.
    pub async fn destroy(&self, guest: &Guest) -> BackendResult<()> {
        let end = Instant::now() + self.config.domain_budget;
        let Some(domain) = self.domain(guest).await? else { return Ok(()) };
        let ended = match domain.is_dying {
            true => Ok(String::new()),
            false => xl::xl("end a domain", self.config.domain_budget, ["destroy", &domain.id.to_string()]).await,
        };
        match xl::domain(domain.id, self.config.call_budget).await? {
            // It went by itself meanwhile, or is about to; somebody may still hold a page of it.
            None => Ok(()),
            Some(left) if left.is_dying => {
                while Instant::now() < end && xl::domain(domain.id, self.config.call_budget).await?.is_some() {
                    sleep(DYING_POLL).await;
                }
                Ok(())
            }
            Some(_) => Err(ended.err().unwrap_or_else(|| BackendError::Failed {
                what: "end a domain",
                detail: format!("domain {} is still there", domain.id),
            })),
        }
    }

    /// Ends what there is of a guest: nothing of it is here afterwards. The caller holds its work.
    ///
    /// # Errors
    /// When something is left; it is tried again when the guest is looked after.
    pub async fn release(&self, guest: &Arc<Guest>, reason: StopReason) -> BackendResult<()> {
        let home = guest.home.clone();
        blocking("note how a guest ends", move || home.note_end(reason)).await?;
        guest.set_arrival(None);
        if let Role::Incoming(Some(process)) = guest.record().role {
            process.end().await;
        }
        self.destroy(guest).await?;
        self.forget(guest).await?;
        self.tell(guest.id(), GuestEvent::Stopped(reason));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_without_a_record_is_not_absence() {
        let domain = |uuid: &str, is_dying| xl::Domain {
            uuid: uuid.to_owned(),
            id: 3,
            memory_mib: 64,
            is_paused: false,
            shutdown: None,
            is_dying,
        };
        let ours = GuestId::generate().uuid().to_string();
        let by_hand = "7a0b2c1d-7777-4777-8777-777777777777";
        assert!(is_of_a_guest(&ours) && !is_of_a_guest(by_hand) && !is_of_a_guest(""), "{ours}");
        let all = [domain(by_hand, false), domain(&ours, false)];
        assert_eq!(stray(&all, |uuid| uuid == ours), Some(&all[1]));
        assert_eq!(stray(&all, is_of_a_guest), Some(&all[1]));
        assert_eq!(stray(&all[..1], is_of_a_guest), None);
        // It is being taken apart.
        assert_eq!(stray(&[domain(&ours, true)], |uuid| uuid == ours), None);
    }
}
