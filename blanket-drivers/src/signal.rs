//! One signal of this process that gets a thread out of `KVM_RUN`.

use std::sync::{
    Once,
    atomic::{AtomicI32, Ordering},
};

extern "C" fn on_signal(_signal: libc::c_int) {
    #[cfg(target_arch = "x86_64")]
    crate::vmm::vcpu::on_signal();
}

/// A real-time signal that interrupts and does not kill; claimed once. `None` when none is free.
pub(crate) fn kick() -> Option<libc::c_int> {
    static ONCE: Once = Once::new();
    static CLAIMED: AtomicI32 = AtomicI32::new(0);
    ONCE.call_once(|| {
        for signal in (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev() {
            // SAFETY: all-zero is a valid sigaction; the pointers are to locals; the handler does nothing that a
            // signal's handler may not.
            unsafe {
                let mut now: libc::sigaction = std::mem::zeroed();
                let is_free =
                    libc::sigaction(signal, std::ptr::null(), &raw mut now) == 0 && now.sa_sigaction == libc::SIG_DFL;
                if !is_free {
                    continue;
                }
                let mut ours: libc::sigaction = std::mem::zeroed();
                ours.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
                // No SA_RESTART: the point is to interrupt.
                if libc::sigaction(signal, &raw const ours, std::ptr::null_mut()) == 0 {
                    CLAIMED.store(signal, Ordering::Release);
                    return;
                }
            }
        }
    });
    Some(CLAIMED.load(Ordering::Acquire)).filter(|signal| *signal != 0)
}
