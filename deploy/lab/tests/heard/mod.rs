//! What guests in hosts that are VMs say on their consoles, waited for.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use supercloud_api::ids::GuestId;
use supercloud_lab::{
    command::pause,
    fleet::{Console, Fleet, Said},
};

/// Everything is 20 to 80 times slower in there, and slower still on a machine that others use.
pub const LONG: Duration = Duration::from_secs(900);

/// A guest's console.
pub fn console(fleet: &Fleet, guest: GuestId) -> Arc<Mutex<Console>> {
    Arc::new(Mutex::new(fleet.console(guest).unwrap()))
}

/// Hears the two guests until `is_enough`; the newest of each, with the host where it was said.
pub async fn hear(
    console: &Arc<Mutex<Console>>,
    what: &str,
    mut is_enough: impl FnMut(&str, &Said) -> bool + Send + 'static,
) {
    let (console, words) = (console.clone(), what.to_owned());
    let heard = tokio::task::spawn_blocking(move || {
        let end = Instant::now() + LONG;
        let mut console = console.lock().unwrap();
        while Instant::now() < end {
            for heard in console.poll() {
                if is_enough(&heard.host, &heard.said) {
                    return;
                }
            }
            pause(Duration::from_millis(300));
        }
        panic!("{words} is not heard: {:?}", console.other_lines());
    });
    heard.await.unwrap();
}
