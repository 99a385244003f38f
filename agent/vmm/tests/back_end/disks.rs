//! Disks at volume processes that come and go.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use supercloud_blanket::{
    Backend as _, BackendError,
    backend::{GuestEvent, RunState, StopMode},
    device::{Boot, Disk},
    host::NbdSocket,
};
use supercloud_ids::GuestId;

use crate::{Host, boot_disk, event, guest::runs_guests};

/// What serves a disk by NBD, to one client after the other.
struct Server {
    socket: PathBuf,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(socket: PathBuf, disk: Vec<u8>) -> Self {
        let _ = std::fs::remove_file(&socket);
        let listener = StdListener::bind(&socket).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&is_over);
        let serve = move || {
            for client in listener.incoming() {
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                // Until it goes.
                let _ = serve(&client.unwrap(), &disk, &ends);
            }
        };
        Self { socket, is_over, thread: Some(std::thread::spawn(serve)) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = StdStream::connect(&self.socket);
        self.thread.take().unwrap().join().unwrap();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn serve(mut stream: &StdStream, disk: &[u8], is_over: &AtomicBool) -> std::io::Result<()> {
    stream.set_read_timeout(Some(std::time::Duration::from_millis(50)))?;
    stream.write_all(&0x4e42_444d_4147_4943u64.to_be_bytes())?;
    stream.write_all(&0x4948_4156_454f_5054u64.to_be_bytes())?;
    stream.write_all(&3u16.to_be_bytes())?;
    read(stream, &mut [0; 26], is_over)?;
    let mut export = 0u16.to_be_bytes().to_vec();
    export.extend((disk.len() as u64).to_be_bytes());
    export.extend(5u16.to_be_bytes());
    for (kind, data) in [(3u32, export), (1, Vec::new())] {
        stream.write_all(&0x0003_e889_0455_65a9u64.to_be_bytes())?;
        stream.write_all(&7u32.to_be_bytes())?;
        stream.write_all(&kind.to_be_bytes())?;
        stream.write_all(&u32::try_from(data.len()).unwrap().to_be_bytes())?;
        stream.write_all(&data)?;
    }
    loop {
        let mut header = [0; 28];
        read(stream, &mut header, is_over)?;
        let from = usize::try_from(u64::from_be_bytes(header[16..24].try_into().unwrap())).unwrap();
        let bytes = usize::try_from(u32::from_be_bytes(header[24..].try_into().unwrap())).unwrap();
        stream.write_all(&0x6744_6698u32.to_be_bytes())?;
        stream.write_all(&[0; 4])?;
        stream.write_all(&header[8..16])?;
        stream.write_all(&disk[from..from + bytes])?;
    }
}

/// Reads all of it; an error when the server is over.
fn read(mut stream: &StdStream, mut buffer: &mut [u8], is_over: &AtomicBool) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match stream.read(buffer) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = &mut buffer[count..],
            Err(_) if is_over.load(Ordering::SeqCst) => return Err(std::io::ErrorKind::ConnectionAborted.into()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_guest_boots_from_a_served_disk_and_again_when_its_volume_process_is_back() {
    if !runs_guests("a_guest_boots_from_a_served_disk_and_again_when_its_volume_process_is_back") {
        return;
    }
    let Some(image) = boot_disk::disk("one.") else {
        println!("SKIPPED: no mke2fs here");
        return;
    };
    let mut host = Host::new().await;
    let guest = GuestId::generate();
    let mut launch = host.launch(guest, 1).await;
    launch.spec.boot = Boot::Disk;
    (launch.host.kernel, launch.host.initrd) = (None, None);
    launch.spec.devices.disks.push(Disk { name: "root".to_owned(), is_read_only: false });
    let socket = host.path("nbd.sock");
    launch.host.disks.insert("root".to_owned(), NbdSocket { socket: socket.clone(), export: String::new() });
    // Nothing on it that could be booted: whoever starts the guest hears why not.
    let server = Server::start(socket.clone(), vec![0; 1 << 20]);
    let said = host.back_end.start(launch.clone()).await.unwrap_err();
    assert!(matches!(&said, BackendError::Failed { detail, .. } if detail.contains("ext4")), "{said}");
    assert_eq!(host.state(guest).await, None);
    drop(server);

    let server = Server::start(socket.clone(), image.clone());
    host.back_end.start(launch).await.unwrap();
    host.echoes(b'a').await;
    let mut events = host.back_end.events();
    // It resets itself while nobody serves its disk: that is told, and costs time only. The agent may be another one by then.
    drop(server);
    host.types(b'r').await;
    event(&mut events, &GuestEvent::DiskError { disk: "root".to_owned() }).await;
    assert_eq!(host.state(guest).await, Some(RunState::Running));
    host.restart().await;
    let mut events = host.back_end.events();
    event(&mut events, &GuestEvent::DiskError { disk: "root".to_owned() }).await;
    let _server = Server::start(socket, image);
    event(&mut events, &GuestEvent::Resumed).await;
    host.echoes(b'b').await;
    let said = std::fs::read_to_string(host.path("console.log")).unwrap();
    assert_eq!(said.matches("from diskone.").count(), 2, "{said}");
    host.back_end.stop(guest, StopMode::Kill).await.unwrap();
}
