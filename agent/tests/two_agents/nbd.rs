//! As much of an NBD client as a guest in a test needs (fixed newstyle, EXPORT_NAME, simple replies).

use std::{io, path::Path};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

const READ: u16 = 0;
const WRITE: u16 = 1;
const CUT: u16 = 0x5343;
const FUA: u16 = 1;

pub struct Nbd {
    stream: UnixStream,
    cookie: u64,
}

impl Nbd {
    pub async fn connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket).await?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).await?;
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3_u32.to_be_bytes()).await?;
        stream.write_all(b"IHAVEOPT").await?;
        stream.write_all(&1_u32.to_be_bytes()).await?;
        stream.write_all(&0_u32.to_be_bytes()).await?;
        let mut export = [0; 10];
        stream.read_exact(&mut export).await?;
        Ok(Self { stream, cookie: 0 })
    }

    async fn request(&mut self, command: u16, flags: u16, offset: u64, data: &[u8], len: usize) -> io::Result<Vec<u8>> {
        self.cookie += 1;
        let mut header = Vec::new();
        header.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        header.extend_from_slice(&flags.to_be_bytes());
        header.extend_from_slice(&command.to_be_bytes());
        header.extend_from_slice(&self.cookie.to_be_bytes());
        header.extend_from_slice(&offset.to_be_bytes());
        header.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        header.extend_from_slice(data);
        self.stream.write_all(&header).await?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).await?;
        assert_eq!(&reply[..4], &0x6744_6698_u32.to_be_bytes());
        if reply[4..8] != [0; 4] {
            return Err(io::Error::other(format!("the disk answers error {:?}", &reply[4..8])));
        }
        let mut answer = vec![0; if command == READ { len } else { 0 }];
        self.stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    /// Writes, durably.
    pub async fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(WRITE, FUA, offset, data, data.len()).await.map(drop)
    }

    /// Cuts the volume for its mirror.
    pub async fn cut(&mut self, number: u64) -> io::Result<()> {
        self.request(CUT, 0, number, &[], 0).await.map(drop)
    }

    pub async fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.request(READ, 0, offset, &[], len).await
    }
}
