//! A test server of OURS that answers EC2's query protocol as AWS documents it: what the test says for each call.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

/// A call as it came.
#[derive(Debug, Clone)]
pub struct Call {
    pub action: String,
    /// The how manieth of its action, from 1.
    pub number: usize,
    fields: BTreeMap<String, String>,
}

impl Call {
    pub fn get(&self, field: &str) -> Option<&str> {
        self.fields.get(field).map(String::as_str)
    }
}

/// An answer.
pub struct Answer {
    status: u16,
    /// What stands within the response's element, or an error's code.
    content: Result<String, &'static str>,
}

impl Answer {
    pub fn ok(content: &str) -> Self {
        Self { status: 200, content: Ok(content.to_owned()) }
    }

    pub fn error(status: u16, code: &'static str) -> Self {
        Self { status, content: Err(code) }
    }

    fn body(&self, action: &str) -> String {
        match &self.content {
            Ok(content) => format!(
                "<{action}Response xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>r</requestId>{content}</{action}Response>"
            ),
            Err(code) => format!(
                "<Response><Errors><Error><Code>{code}</Code><Message>as documented</Message></Error></Errors>\
                 <RequestID>r</RequestID></Response>"
            ),
        }
    }
}

/// The server; its thread ends with the test's process.
pub struct Ours {
    pub address: SocketAddr,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Ours {
    pub fn start(answer: impl Fn(&Call) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
        let (kept, answer) = (Arc::clone(&calls), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (kept, answer) = (Arc::clone(&kept), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &kept, &*answer));
            }
        });
        Self { address, calls }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn serve(stream: TcpStream, calls: &Mutex<Vec<Call>>, answer: &dyn Fn(&Call) -> Answer) {
    let mut writer = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        let mut line = String::new();
        loop {
            line.clear();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let lower = line.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let text = String::from_utf8(body).unwrap();
        let fields: BTreeMap<String, String> = text
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (decoded(name), decoded(value)))
            .collect();
        let call = {
            let mut calls = calls.lock().unwrap();
            let action = fields.get("Action").cloned().unwrap_or_default();
            let number = calls.iter().filter(|call| call.action == action).count() + 1;
            let call = Call { action, number, fields };
            calls.push(call.clone());
            call
        };
        let answer = answer(&call);
        let body = answer.body(&call.action);
        let head =
            format!("HTTP/1.1 {} X\r\ncontent-type: text/xml\r\ncontent-length: {}\r\n\r\n", answer.status, body.len());
        if writer.write_all(head.as_bytes()).and_then(|()| writer.write_all(body.as_bytes())).is_err() {
            return;
        }
    }
}

/// Entries of a price history: type, zone, price, time.
pub fn prices(entries: &[(&str, &str, &str, &str)], next: &str) -> String {
    let items: String = entries
        .iter()
        .map(|(of, zone, price, at)| {
            format!(
                "<item><instanceType>{of}</instanceType><productDescription>Linux/UNIX</productDescription>\
                 <spotPrice>{price}</spotPrice><timestamp>{at}</timestamp><availabilityZone>{zone}</availabilityZone></item>"
            )
        })
        .collect();
    format!("<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken>{next}</nextToken>")
}

/// A catalogue of one type with a feature of its processor.
pub fn instance_type(name: &str, feature: &str) -> String {
    let feature = if feature.is_empty() { String::new() } else { format!("<item>{feature}</item>") };
    format!(
        "<instanceTypeSet><item><instanceType>{name}</instanceType><bareMetal>false</bareMetal>\
         <supportedUsageClasses><item>on-demand</item><item>spot</item></supportedUsageClasses>\
         <processorInfo><supportedArchitectures><item>x86_64</item></supportedArchitectures>\
         <supportedFeatures>{feature}</supportedFeatures></processorInfo>\
         <vCpuInfo><defaultVCpus>2</defaultVCpus></vCpuInfo><memoryInfo><sizeInMiB>4096</sizeInMiB></memoryInfo></item>\
         </instanceTypeSet>"
    )
}

/// A running spot machine with our tags, as RunInstances tells of it.
pub fn launched(id: &str, of: &str, token: &str) -> String {
    format!(
        "<instancesSet><item><instanceId>{id}</instanceId><instanceState><code>16</code><name>running</name></instanceState>\
         <instanceType>{of}</instanceType><instanceLifecycle>spot</instanceLifecycle>\
         <placement><availabilityZone>us-east-1a</availabilityZone></placement>\
         <tagSet><item><key>supercloud-token</key><value>{token}</value></item></tagSet></item></instancesSet>"
    )
}
