//! Devices that are saved and go on elsewhere.

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::vmm::virtio::{VirtioPci, transport::DeviceState};

fn disk_of(file: &File) -> crate::vmm::virtio::Device {
    let backend = Box::new(block::RawFile::new(file.try_clone().unwrap()).unwrap());
    block::device(backend, "disk", false)
}

#[test]
fn a_disk_goes_on_with_the_request_that_it_had_not_taken() {
    let (mut driver, file, bytes) = block(false);
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1000;
    for sector in 0..20 {
        assert_eq!(request(&mut driver, 0, sector, &[writable(data, 512)]), (0, 513));
    }
    // Made available while nobody serves; the kick is lost with the old device.
    driver.device.pause();
    let mut header = 0u32.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(7u64.to_le_bytes());
    driver.put(BUFFERS, &header);
    driver.put(data, &[0; 512]);
    driver.offer(0, 0, &[readable(BUFFERS, 16), writable(data, 512), writable(BUFFERS + 16, 1)]);
    let mut moved = driver.moved(disk_of(&file));
    assert_eq!(moved.status(), 15);
    assert!(!moved.has_used(0), "it is paused");
    moved.device.resume();
    assert_eq!(moved.await_used(0), (0, 513));
    assert_eq!(moved.get(data, 512), bytes[7 * 512..8 * 512]);
    // Interrupts go where the driver had them sent.
    assert_eq!(request(&mut moved, 0, 3, &[writable(data, 512)]), (0, 513));
    moved.device.pause();
    assert_eq!(*moved.sent.0.lock().unwrap(), [1, 1]);
    // A move that came to nothing: the old one takes the request, too.
    driver.device.resume();
    assert_eq!(driver.await_used(0), (0, 513));
    // And it can be reset and driven anew.
    moved.write(20, &[0]);
    moved.bring_up(1 << 9);
    assert_eq!(request(&mut moved, 0, 9, &[writable(data, 512)]), (0, 513));
}

#[test]
fn each_phase_is_kept_and_input_that_waits_is_not_lost() {
    let (file, _) = disk();
    for writes in [&[][..], &[1], &[1, 3], &[1, 3, 0x80]] {
        let mut driver = Driver::new(disk_of(&file));
        writes.iter().for_each(|status| driver.write(20, &[*status]));
        let mut moved = driver.moved(disk_of(&file));
        assert_eq!((moved.status(), moved.device.phase()), (driver.status(), driver.device.phase()));
        let common: [u8; 56] = driver.read(0);
        assert_eq!(moved.read::<56>(0), common);
    }
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.send(b"typed before").unwrap();
    theirs.set_nonblocking(true).unwrap();
    let console = |input| console::device(Box::new(std::io::sink()), input);
    let mut driver = Driver::new(console(Some(File::from(OwnedFd::from(theirs)))));
    driver.bring_up(0);
    // The guest has no buffer for it yet.
    while driver.device.save().is_ok() || {
        driver.device.pause();
        driver.device.save().unwrap().handler.is_empty()
    } {
        driver.device.resume();
        std::thread::yield_now();
    }
    let mut moved = driver.moved(console(None));
    moved.offer(0, 0, &[writable(BUFFERS, 64)]);
    moved.device.resume();
    assert_eq!(moved.await_used(0), (0, 12));
    assert_eq!(moved.get(BUFFERS, 12), b"typed before");
}

fn live() -> (Driver, File, Value) {
    let (mut driver, file, _) = block(false);
    driver.bring_up(1 << 9);
    driver.device.pause();
    let state = serde_json::to_value(driver.device.save().unwrap()).unwrap();
    (driver, file, state)
}

fn restored(driver: &Driver, file: &File, state: &DeviceState) -> (Driver, Result<(), String>) {
    let mut to = Driver::new(disk_of(file));
    to.put(0, &driver.get(0, usize::try_from(RAM_BYTES).unwrap()));
    let outcome = VirtioPci::restore(&mut to.device, state).map_err(|error| error.to_string());
    (to, outcome)
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let (driver, file, state) = live();
    for (at, value, named) in [
        ("/number", 1.into(), "another kind"),
        ("/features", 1.into(), "features"),
        ("/features", u64::MAX.into(), "features"),
        ("/config_vector", 9.into(), "registers"),
        ("/failed_status", 0x20.into(), "registers"),
        ("/queues", Vec::<u8>::new().into(), "another kind"),
        ("/queues/0/size", 17.into(), "queues"),
        ("/queues/0/size", 0.into(), "queues"),
        ("/queues/0/size", 512.into(), "queues"),
        ("/queues/0/vector", 9.into(), "queues"),
        ("/queues/0/places/0", RAM_BYTES.into(), "queues"),
        ("/queues/0/places/2", u64::MAX.into(), "queues"),
        ("/queues/0/done", Value::Null, "queues"),
        ("/config/0", 0.into(), "configuration"),
        ("/config", Vec::<u8>::new().into(), "configuration"),
        ("/msix/pending", 4.into(), "interrupts"),
        ("/handler", vec![1].into(), "in hand"),
    ] {
        let mut changed = state.clone();
        *changed.pointer_mut(at).unwrap() = value;
        let parsed = serde_json::from_value(changed).unwrap();
        let (_, outcome) = restored(&driver, &file, &parsed);
        assert!(outcome.as_ref().is_err_and(|said| said.contains(named)), "{at}: {outcome:?}");
    }
    let (mut to, outcome) = restored(&driver, &file, &serde_json::from_value(state).unwrap());
    outcome.unwrap();
    to.device.resume();
    assert_eq!(request(&mut to, 0, 1, &[writable(BUFFERS + 0x1000, 512)]), (0, 513));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever numbers stand in it: refused, or a device that answers and can be reset.
    #[test]
    fn no_state_does_harm(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0u32..64), 1..4)) {
        let (driver, file, mut state) = live();
        for (which, value, shift) in changes {
            let mut places = Vec::new();
            numbers(&mut state, &mut places);
            let count = places.len();
            *places[which.index(count)] = (value >> shift).into();
        }
        if let Ok(state) = serde_json::from_value(state) {
            let (mut to, _) = restored(&driver, &file, &state);
            to.device.resume();
            to.kick(0);
            to.device.pause();
            to.write(20, &[0]);
            prop_assert_eq!(to.status(), 0);
        }
    }
}

fn numbers<'v>(value: &'v mut Value, places: &mut Vec<&'v mut Value>) {
    match value {
        Value::Number(_) => places.push(value),
        Value::Array(items) => items.iter_mut().for_each(|item| numbers(item, places)),
        Value::Object(fields) => fields.values_mut().for_each(|field| numbers(field, places)),
        _ => {}
    }
}
