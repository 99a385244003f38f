//! An agent with a good certificate that says whatever a test wants.

use supercloud_api::{
    frame::{Frame, read_frame, write_frame},
    handover::Report,
    ids::GuestId,
    link::{self, Answer, Envelope, Notice, Outcome, Query, ReportDetails, Welcome, kind},
    tls,
};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::agent::Seat;

pub struct Liar {
    pub stream: TlsStream<TcpStream>,
    number: u64,
    /// Directives that came before answers.
    pub heard: Vec<link::Directive>,
}

impl Liar {
    /// Dials in with the seat's certificate; `None`: not welcome.
    pub async fn dial(seat: &Seat) -> Option<Self> {
        Self::dial_as(seat, seat.hello(Vec::new())).await
    }

    pub async fn dial_as(seat: &Seat, hello: link::Hello) -> Option<Self> {
        let (stream, answer) = Self::greet(seat, &hello).await?;
        if answer.kind == kind::FAREWELL {
            return None;
        }
        let _welcome: Welcome = answer.parse_json(kind::WELCOME, link::VERSION).unwrap();
        Some(Self { stream, number: 0, heard: Vec::new() })
    }

    async fn greet(seat: &Seat, hello: &link::Hello) -> Option<(TlsStream<TcpStream>, Frame)> {
        let mut stream = seat.dial(tls::ALPN_AGENT).await.ok()?;
        write_frame(&mut stream, &Frame::json(kind::HELLO, link::VERSION, hello).unwrap()).await.ok()?;
        let answer = read_frame(&mut stream).await.ok()?;
        Some((stream, answer))
    }

    /// What a host is told that was removed.
    pub async fn farewell(seat: &Seat) -> Option<link::Farewell> {
        let (_stream, answer) = Self::greet(seat, &seat.hello(Vec::new())).await?;
        answer.parse_json(kind::FAREWELL, link::VERSION).ok()
    }

    pub async fn notice(&mut self, notice: &Notice) {
        write_frame(&mut self.stream, &Frame::json(kind::NOTICE, link::VERSION, notice).unwrap()).await.unwrap();
    }

    pub async fn report(&mut self, guest: GuestId, report: Report) {
        self.notice(&Notice::Report { guest, report, details: Box::new(ReportDetails::default()) }).await;
    }

    /// Asks; everything that was said before has been heard when the answer comes.
    pub async fn ask(&mut self, query: Query) -> Result<Answer, supercloud_api::Problem> {
        self.number += 1;
        let envelope = Envelope { number: self.number, body: query };
        write_frame(&mut self.stream, &Frame::json(kind::QUERY, link::VERSION, &envelope).unwrap()).await.unwrap();
        loop {
            let frame = read_frame(&mut self.stream).await.unwrap();
            if frame.kind == kind::ANSWER {
                let answer: Envelope<Outcome<Answer>> = frame.parse_json(kind::ANSWER, link::VERSION).unwrap();
                assert_eq!(answer.number, self.number);
                return answer.body.into();
            }
            self.heard.push(frame.parse_json(kind::DIRECTIVE, link::VERSION).unwrap());
        }
    }

    /// Waits until the controller hangs up.
    pub async fn is_hung_up(&mut self) -> bool {
        let end = async { while read_frame(&mut self.stream).await.is_ok() {} };
        tokio::time::timeout(super::world::PATIENCE, end).await.is_ok()
    }
}
