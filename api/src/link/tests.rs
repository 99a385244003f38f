//! What must not change on the wire by accident.

use super::*;

#[test]
fn messages_survive_json() {
    let query = Query::GuestToken { guest: GuestId::generate(), epoch: Epoch(3) };
    let text = serde_json::to_string(&Envelope { number: 9, body: query.clone() }).unwrap();
    assert_eq!(serde_json::from_str::<Envelope<Query>>(&text).unwrap().body, query);
    let query = Query::GuestCall {
        guest: GuestId::generate(),
        epoch: Epoch(3),
        call: GuestCall::Migrate {
            wanted: Box::new(serde_json::from_str(r#"{"to":"east"}"#).unwrap()),
            idempotency_key: "k".into(),
        },
    };
    let text = serde_json::to_string(&query).unwrap();
    assert_eq!(serde_json::from_str::<Query>(&text).unwrap(), query);
    // A controller of the version before tells no life.
    let old = r#"{"answer":"guest_token","secret":"s","api_url":"u","ca_pem":"c"}"#;
    assert!(matches!(serde_json::from_str(old).unwrap(), Answer::GuestToken { life_ms: 0, .. }));
    // An agent of the version before tells each time.
    let (guest, epoch) = (GuestId::generate(), Epoch(3));
    let old = format!(r#"{{"notice":"guest_event","guest":"{guest}","epoch":3,"event":"rebooted"}}"#);
    let expected = Notice::GuestEvent { guest, epoch, event: GuestEventKind::Rebooted, times: 1 };
    assert_eq!(serde_json::from_str::<Notice>(&old).unwrap(), expected);
    let outcome: Outcome<Answer> = Outcome::Ok(Answer::Certificate { certificate_pem: "x".into() });
    let text = serde_json::to_string(&outcome).unwrap();
    assert_eq!(serde_json::from_str::<Outcome<Answer>>(&text).unwrap(), outcome);
}

#[test]
fn a_secret_never_shows_in_logs() {
    let secret = Secret([7; 32]);
    assert!(!format!("{secret:?}").contains('7'));
    let json = serde_json::to_string(&secret).unwrap();
    assert_eq!(serde_json::from_str::<Secret>(&json).unwrap(), secret);
    assert!(serde_json::from_str::<Secret>("\"AAAA\"").is_err());
}
