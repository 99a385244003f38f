//! Renting from EC2, as moto plays it, by settings and through REST. Run it by `./deploy/test --ec2`.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use base64::Engine as _;
use supercloud_api::{CloudCreate, HostRent, JoinRequest, Phase, RentingEnd, RentingState, Tenure};

use super::{TestController, rentings::reaches};
use crate::state::HostRecord;

/// moto, ended with the test.
struct Moto(Child, SocketAddr);

impl Drop for Moto {
    fn drop(&mut self) {
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

impl Moto {
    /// None where `deploy/moto` has not said where it is.
    async fn start() -> Option<Self> {
        let Some(program) = std::env::var_os("SUPERCLOUD_MOTO") else {
            assert!(std::env::var_os("SUPERCLOUD_REQUIRE").is_none(), "run it by deploy/moto");
            println!("skipped: run it by deploy/moto");
            return None;
        };
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let port = address.port().to_string();
        let mut command = Command::new(program);
        let child = command.args(["-H", "127.0.0.1", "-p", &port]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let moto = Self(child.unwrap(), address);
        for _ in 0..1200 {
            if TcpStream::connect(address).is_ok() {
                return Some(moto);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("moto does not come up");
    }

    /// What moto itself says, asked past the driver.
    async fn says(&self, query: &str) -> String {
        let scope = "Credential=test/20260101/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=0";
        let request = reqwest::Client::builder().no_proxy().build().unwrap().post(format!("http://{}/", self.1));
        let request = request
            .header("authorization", format!("AWS4-HMAC-SHA256 {scope}"))
            .header("content-type", "application/x-www-form-urlencoded")
            .body(format!("Version=2016-11-15&{query}"));
        request.send().await.unwrap().text().await.unwrap()
    }

    async fn instance_state(&self, instance: &str) -> String {
        let told = self.says(&format!("Action=DescribeInstances&InstanceId.1={instance}")).await;
        between(between(&told, "<instanceState>", "</instanceState>"), "<name>", "</name>").to_owned()
    }
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let rest = text.split_once(before).unwrap_or_else(|| panic!("no {before} in {text}")).1;
    rest.split_once(after).unwrap_or_else(|| panic!("no {after} in {text}")).0.trim()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_rented_from_ec2_joins_by_its_own_user_data_and_is_given_back() {
    let Some(moto) = Moto::start().await else { return };
    let settings = format!(
        "[[providers]]\nname = 'aws'\ndriver = 'ec2'\nregion = 'us-east-1'\nendpoint_url = 'http://{}'\n\
         image_id = 'ami-12c6146b'\non_demand_usd_per_hour = {{ 'm5.large' = '0.096' }}\n",
        moto.1
    );
    let test = TestController::start_with(tempfile::tempdir().unwrap(), &settings).await;
    let admin = test.admin_client();
    admin.create_cloud(&CloudCreate { name: "east".parse().unwrap(), provider: "aws".into() }).await.unwrap();
    let wanted = HostRent {
        host_name: "h1".parse().unwrap(),
        instance_type: "m5.large".into(),
        tenure: Tenure::Spot,
        max_price_nanousd_per_hour: Some(50_000_000),
    };
    let rent = admin.rent_host("east", &wanted).await.unwrap();
    let launched = reaches(&admin, "h1", RentingState::Launched).await;
    let instance = launched.instance.clone().unwrap();
    assert!(!launched.is_started_by_hand && instance.starts_with("i-"), "{launched:?}");
    assert_eq!(moto.instance_state(&instance).await, "running");
    let told = moto.says(&format!("Action=DescribeInstances&InstanceId.1={instance}")).await;
    assert!(told.contains(&launched.id.to_string()), "tagged with its renting: {told}");

    // The machine's first boot has what it joins with.
    let query = format!("Action=DescribeInstanceAttribute&InstanceId={instance}&Attribute=userData");
    let encoded = moto.says(&query).await;
    let encoded = between(between(&encoded, "<userData>", "</userData>"), "<value>", "</value>").to_owned();
    let script = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap();
    let script = String::from_utf8(script).unwrap();
    assert!(script.contains("hostname: h1"), "{script}");
    let token = between(&script, "content: '", "'").to_owned();
    let csr_pem = super::joins::csr(&rcgen::KeyPair::generate().unwrap());
    let joined = test.client("none").join(&JoinRequest { token, csr_pem }).await.unwrap();
    assert_eq!(joined.host, launched.host);
    reaches(&admin, "h1", RentingState::Up).await;
    assert_eq!(admin.operation(rent.id).await.unwrap().phase, Phase::Done);

    let back = admin.return_renting(launched.id, false).await.unwrap();
    let ended = reaches(&admin, "h1", RentingState::Ended).await;
    assert_eq!(ended.end, Some(RentingEnd::Returned));
    assert_eq!(admin.operation(back.id).await.unwrap().phase, Phase::Done);
    assert_eq!(moto.instance_state(&instance).await, "terminated");
    assert!(test.state().need::<HostRecord>(&launched.host).await.unwrap().is_removed);
    test.stop().await;
}
