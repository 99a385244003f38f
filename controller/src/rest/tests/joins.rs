//! Hosts that join.

use rcgen::{CertificateParams, KeyPair};
use supercloud_api::{Code, HostState, JoinRequest, JoinTokenCreate, tls};

use super::{TestController, problem};
use crate::state::{JoinRecord, keys};

pub fn csr(key: &KeyPair) -> String {
    CertificateParams::new(vec!["evil.example".into()]).unwrap().serialize_request(key).unwrap().pem().unwrap()
}

fn wanted(name: &str) -> JoinTokenCreate {
    JoinTokenCreate { host_name: name.parse().unwrap(), cloud: "east".into(), expires_in_s: 60 }
}

#[tokio::test]
async fn a_token_joins_one_host_with_one_key() {
    let test = TestController::start().await;
    test.cloud("east").await;
    let admin = test.admin_client();
    // An agent has no token of the API.
    let agent = test.client("none");
    let token = admin.create_join_token(&wanted("h1")).await.unwrap();
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let request = JoinRequest { token: token.token.clone(), csr_pem: csr(&key) };

    let garbage = JoinRequest { token: token.token.clone(), csr_pem: "x".into() };
    assert_eq!(problem(agent.join(&garbage).await).code, Code::BadRequest);

    let joined = agent.join(&request).await.unwrap();
    assert_eq!(joined.host, token.host);
    let certificate = tls::certificates_of_pem(&joined.certificate_pem).unwrap().remove(0);
    assert_eq!(tls::host_of_certificate(&certificate), Some(joined.host));
    assert!(!joined.certificate_pem.is_empty() && joined.link_address.starts_with("127.0.0.1:"));
    assert!(!joined.link_address.ends_with(":0"));
    let host = admin.host("h1").await.unwrap();
    assert_eq!((host.state, host.overlay_index), (HostState::Unreachable, 1));
    assert_eq!(host.certificate_sha256, tls::fingerprint(&certificate));

    // Its answer was lost: the same key gets another certificate, another key nothing.
    let again = agent.join(&request).await.unwrap();
    assert_eq!(again.host, joined.host);
    let stolen = JoinRequest { token: token.token.clone(), csr_pem: csr(&other) };
    assert_eq!(problem(agent.join(&stolen).await).code, Code::Unauthenticated);
    assert_eq!(admin.hosts().await.unwrap().len(), 1);
    assert_eq!(problem(admin.create_join_token(&wanted("h1")).await).code, Code::NameTaken);
    test.stop().await;
}

#[tokio::test]
async fn of_many_agents_with_one_token_one_joins() {
    let test = TestController::start().await;
    test.cloud("east").await;
    let admin = test.admin_client();
    let token = admin.create_join_token(&wanted("h1")).await.unwrap();
    let tries = (0..8).map(|_| {
        let (agent, token) = (test.client("none"), token.token.clone());
        async move {
            let key = KeyPair::generate().unwrap();
            agent.join(&JoinRequest { token, csr_pem: csr(&key) }).await
        }
    });
    let outcomes = futures::future::join_all(tries).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(admin.hosts().await.unwrap().len(), 1);
    test.stop().await;
}

#[tokio::test]
async fn an_expired_or_forged_token_is_worth_nothing_and_is_removed() {
    let test = TestController::start().await;
    test.cloud("east").await;
    let admin = test.admin_client();
    let agent = test.client("none");
    let late = JoinTokenCreate { expires_in_s: 901, ..wanted("h1") };
    assert_eq!(problem(admin.create_join_token(&late).await).code, Code::BadRequest);
    let nowhere = JoinTokenCreate { cloud: "mars".into(), ..wanted("h1") };
    assert_eq!(problem(admin.create_join_token(&nowhere).await).code, Code::NotFound);

    let token = admin.create_join_token(&wanted("h1")).await.unwrap();
    let csr_pem = csr(&KeyPair::generate().unwrap());
    let forged = token.token.replace(&token.host.to_string(), &supercloud_api::ids::HostId::generate().to_string());
    for bad in [forged, "scjoin".into(), String::new()] {
        let request = JoinRequest { token: bad, csr_pem: csr_pem.clone() };
        assert_eq!(problem(agent.join(&request).await).code, Code::Unauthenticated);
    }
    let (all, _) = supercloud_store::list(&**test.state().store(), &keys::folder("join")).await.unwrap();
    let hash = all[0].key.as_str().rsplit('/').next().unwrap().to_owned();
    assert!(!token.token.contains(&hash), "the store has the secret's hash only");
    test.edit::<JoinRecord>(&hash, |record| record.expires_at_ms = 1).await;
    let request = JoinRequest { token: token.token, csr_pem };
    assert_eq!(problem(agent.join(&request).await).code, Code::Unauthenticated);
    super::super::join::sweep(test.parts(), 2).await.unwrap();
    assert!(test.state().read::<JoinRecord>(&hash).await.unwrap().is_none());
    assert!(admin.hosts().await.unwrap().is_empty());
    test.stop().await;
}

#[tokio::test]
async fn one_address_with_nothing_to_say_keeps_no_other_from_joining() {
    let test = TestController::start().await;
    let url = format!("https://{}/v1/join", test.address());
    let silent = |http: &reqwest::Client| http.post(&url).header("Content-Type", "application/json");
    let _held = test.trickle(silent, "127.0.0.2", 48, 40).await;
    let other = test.http_from("127.0.0.3").post(&url).header("Content-Type", "application/json");
    let answer = other.body(r#"{"token":"x","csr_pem":"x"}"#).send().await.unwrap();
    assert_eq!(answer.status(), reqwest::StatusCode::UNAUTHORIZED, "it was heard");
    test.stop().await;
}
