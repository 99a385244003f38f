//! What must hold.

use super::*;

impl Model {
    /// What must hold in every state, and over every step.
    pub(super) fn check(&self, before: &World, w: &World) -> Result<(), Violation> {
        let record = self.record(w);
        record.check().map_err(|error| error.to_string())?;
        let was = self.record(before);
        if record.epoch < was.epoch {
            return Err("the epoch went back".to_owned());
        }
        if let (Some(a), Some(b)) = (&was.operation, &record.operation)
            && a.id == b.id
            && (!is_ahead(a.phase, b.phase) || (a.verdict != b.verdict && a.verdict != Verdict::Open))
        {
            return Err(format!("operation {} went back from {} to {}", a.id, a.phase, b.phase));
        }
        if let Some(last) = record.last
            && was.last != record.last
            && let Some(op) = &was.operation
            && !is_ahead(op.phase, last.phase)
        {
            return Err(format!("operation {} ended as {} out of {}", op.id, last.phase, op.phase));
        }
        let mut running = 0;
        for (n, h) in w.hosts.iter().enumerate() {
            for p in h.processes.iter().flatten().filter(|p| p.mode == Mode::Running && !self.is_fenced(w, n, p)) {
                running += 1;
                if !record.is_owned_by(host(n), Epoch(u64::from(p.epoch))) {
                    return Err(format!("host {n} runs the guest at epoch {} and does not own it", p.epoch));
                }
                match h.volume {
                    Some(volume) if volume.access == Access::Active(p.epoch) => {
                        if volume.map < w.truth && !w.lost {
                            return Err(format!("write {} was acknowledged and is lost", w.truth));
                        }
                        if let Some(version) = volume.needs
                            && w.used.kills == 0
                            && !can_be_had(w, n, version)
                        {
                            return Err(format!("blocks that host {n} still needs were deleted"));
                        }
                    }
                    // Between the run of a step's effects a guest never has less than its volume.
                    _ => return Err(format!("host {n} runs the guest on a volume that refuses it")),
                }
            }
        }
        if running > 1 {
            return Err("two copies run".to_owned());
        }
        if w.lost && w.used.reboots + w.used.kills == 0 {
            return Err("the guest was lost though no host died".to_owned());
        }
        Ok(())
    }

    /// Nothing is under way and nothing is left: one running copy and no more, or none where none should be, or a loss that was said aloud.
    pub fn is_settled(&self, w: &World) -> bool {
        let record = self.record(w);
        if record.operation.is_some() {
            return false;
        }
        w.hosts.iter().enumerate().all(|(n, h)| {
            let machine = self.machine(h);
            let owns = record.owner == Owner::Host(host(n));
            let holds = record.holders.iter().any(|holder| holder.host == host(n) && holder.needed);
            let epoch = byte(record.epoch);
            let processes: Vec<_> = h.processes.iter().flatten().collect();
            if h.dead {
                // What it owned must have been declared.
                return !owns && record.holders.iter().all(|holder| holder.host != host(n) || holder.lost);
            }
            if h.down || !self.queues.get(h.queue).is_empty() || h.copying.is_some() {
                return false;
            }
            if owns {
                // Blocks that only a dead host had: it runs on and says what it misses.
                let stalled = record.last.is_some_and(|last| last.phase == Phase::Failed)
                    && record.holders.iter().any(|holder| holder.lost)
                    && matches!(machine.destination().state(), DestinationState::Running { .. })
                    && processes.iter().all(|p| !p.pages_missing);
                return w.leases.at[n] == Lease::Free
                    && processes.len() == 1
                    && processes[0].mode == Mode::Running
                    && processes[0].epoch == epoch
                    && (machine.is_quiet() || stalled);
            }
            let source = if holds {
                matches!(machine.source().state(), SourceState::Serving { .. })
                    && matches!(h.volume, Some(Volume { access: Access::Sealed(_), .. }))
            } else {
                matches!(machine.source().state(), SourceState::Idle) && h.volume.is_none()
            };
            source && processes.is_empty() && matches!(machine.destination().state(), DestinationState::Idle)
        })
    }
}

pub(super) fn raised(w: &mut World, alarm: Alarm) -> Result<(), Violation> {
    match alarm {
        Alarm::GuestLost { .. } | Alarm::LostAfterSwitch { .. } => {
            w.lost = true;
            Ok(())
        }
        // It lived, and stood still.
        Alarm::Superseded { .. } if w.leases.failed_over => Ok(()),
        Alarm::NeededCopyLost { .. } if w.used.kills + w.used.reboots > 0 => Ok(()),
        other => Err(format!("false alarm: {other}")),
    }
}

/// Whether blocks of this version can be had for host `n`, whose own full content counts too.
pub(super) fn can_be_had(w: &World, n: usize, version: u8) -> bool {
    let full = |version| w.hosts.iter().any(|h| h.volume.is_some_and(|v| v.full == Some(version)));
    w.hosts
        .iter()
        .enumerate()
        .any(|(m, h)| m != n && h.volume.is_some_and(|v| v.map == version && v.needs.is_none_or(full)))
        || full(version)
}
