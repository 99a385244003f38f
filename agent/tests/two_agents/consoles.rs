//! Consoles that the controller opens.

use supercloud_api::{
    handover::OperationKind,
    ids::{Epoch, GuestId},
    link::{ConsoleBytes, ConsoleNews, ConsoleOrder, Directive},
};
use supercloud_blanket::Backend as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

use crate::lab::Lab;

/// What a console said so far, and whether it is over.
fn heard(lab: &Lab, console: u64) -> (String, bool) {
    let (mut said, mut is_over) = (Vec::new(), false);
    for (number, news) in lab.controller.consoles(lab.hosts[0].id) {
        match news {
            _ if number != console => {}
            ConsoleNews::Said { data } => said.extend(data.0),
            ConsoleNews::Closed { .. } => is_over = true,
        }
    }
    (String::from_utf8(said).unwrap(), is_over)
}

fn open(lab: &Lab, console: u64, guest: GuestId, epoch: Epoch) {
    let order = ConsoleOrder::Open { guest, epoch };
    lab.controller.direct(lab.hosts[0].id, Directive::Console { console, order });
}

async fn accepted(listener: &UnixListener) -> UnixStream {
    tokio::time::timeout(std::time::Duration::from_secs(20), listener.accept()).await.unwrap().unwrap().0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_shows_the_past_and_the_present_takes_what_is_typed_and_ends_with_the_guest() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let epoch = lab.controller.record(guest).epoch;
    let socket = lab.hosts[0].hypervisor.console(guest).await.unwrap();
    let log = lab.hosts[0].memory_file(guest).with_file_name("console.log");
    std::fs::write(&log, format!("{}it booted\n", "x".repeat(20_000))).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();

    open(&lab, 7, guest, epoch);
    let mut console = accepted(&listener).await;
    console.write_all(b"login: ").await.unwrap();
    lab.eventually("it shows both", async || heard(&lab, 7).0.ends_with("it booted\nlogin: ")).await;
    assert!(heard(&lab, 7).0.len() < 10_000, "only the end of what it said before");
    let order = ConsoleOrder::Type { data: ConsoleBytes(b"root\r".to_vec()) };
    lab.controller.direct(lab.hosts[0].id, Directive::Console { console: 7, order });
    let mut typed = [0; 5];
    console.read_exact(&mut typed).await.unwrap();
    assert_eq!(&typed, b"root\r");

    // The newest takes its place; the older one is told.
    open(&lab, 8, guest, epoch);
    assert_eq!(console.read(&mut typed).await.unwrap(), 0);
    let mut console = accepted(&listener).await;
    lab.eventually("the older one is over", async || heard(&lab, 7).1).await;
    lab.controller.direct(lab.hosts[0].id, Directive::Console { console: 8, order: ConsoleOrder::Close });
    assert_eq!(console.read(&mut typed).await.unwrap(), 0);

    // Of another epoch, and of a guest that is not there.
    open(&lab, 9, guest, Epoch(epoch.0 + 1));
    open(&lab, 10, GuestId::generate(), epoch);
    lab.eventually("both are refused", async || heard(&lab, 9).1 && heard(&lab, 10).1).await;

    // It ends with the hypervisor's end of it, and with the link.
    open(&lab, 11, guest, epoch);
    drop(accepted(&listener).await);
    lab.eventually("it is over", async || heard(&lab, 11).1).await;
    open(&lab, 12, guest, epoch);
    let mut console = accepted(&listener).await;
    lab.controller.cut(lab.hosts[0].id);
    assert_eq!(console.read(&mut typed).await.unwrap(), 0);
    lab.controller.heal(lab.hosts[0].id);
    lab.done(guest, OperationKind::Stop).await;
}
