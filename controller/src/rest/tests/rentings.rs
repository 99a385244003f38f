//! Renting own machines, through REST: nothing is launched, a token is shown, and the machine is free again afterwards.

use std::time::Duration;

use supercloud_api::{
    Code, HostRent, JoinRequest, Ledger, LedgerKind, OperationKind, Phase, Renting, RentingEnd, RentingState, Role,
    Tenure,
};

use super::{TestController, problem};
use crate::state::HostRecord;

const PROVIDERS: &str = "\
[[providers]]
name = 'rack'
driver = 'static'
machines = [{ address = '192.0.2.7', type = 'big', vcpus = 8, memory_gib = 32, usd_per_hour = '0.05' }]
";

fn wanted(name: &str) -> HostRent {
    HostRent {
        host_name: name.parse().unwrap(),
        instance_type: "big".into(),
        tenure: Tenure::OnDemand,
        max_price_nanousd_per_hour: None,
    }
}

pub async fn reaches(client: &supercloud_api::client::Client, name: &str, state: RentingState) -> Renting {
    for _ in 0..600 {
        let all = client.rentings().await.unwrap();
        let newest = all.into_iter().rev().find(|renting| renting.host_name.as_str() == name).unwrap();
        if newest.state == state {
            return newest;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{name} is never {state:?}");
}

#[tokio::test]
async fn an_own_machine_is_reserved_joins_by_its_token_and_is_free_again_when_it_is_given_back() {
    let test = TestController::start_with(tempfile::tempdir().unwrap(), PROVIDERS).await;
    let admin = test.admin_client();
    let cloud = supercloud_api::CloudCreate { name: "home".parse().unwrap(), provider: "rack".into() };
    admin.create_cloud(&cloud).await.unwrap();

    let planned = admin.plan_rent("home", &wanted("h1")).await.unwrap();
    assert_eq!((planned.kind, planned.phase), (OperationKind::HostRent, Phase::Plan));
    assert!(admin.rentings().await.unwrap().is_empty(), "a dry run does nothing");

    let operation = admin.rent_host("home", &wanted("h1")).await.unwrap();
    let renting = reaches(&admin, "h1", RentingState::Launched).await;
    assert_eq!((renting.address.as_deref(), renting.is_started_by_hand), (Some("192.0.2.7"), true));
    let taken = problem(admin.rent_host("home", &wanted("h1")).await);
    assert_eq!(taken.code, Code::NameTaken);
    // The only one of its type is reserved.
    let second = admin.rent_host("home", &wanted("h2")).await.unwrap();
    let refused = reaches(&admin, "h2", RentingState::Ended).await;
    assert_eq!((refused.end, refused.error.unwrap().code), (Some(RentingEnd::Refused), Code::NoCapacity));
    assert_eq!(admin.operation(second.id).await.unwrap().phase, Phase::RolledBack);

    let token = admin.renting_join_token(renting.id).await.unwrap();
    let csr_pem = super::joins::csr(&rcgen::KeyPair::generate().unwrap());
    let joined = test.client("none").join(&JoinRequest { token: token.token, csr_pem }).await.unwrap();
    assert_eq!(joined.host, renting.host);
    reaches(&admin, "h1", RentingState::Up).await;
    assert_eq!(admin.operation(operation.id).await.unwrap().phase, Phase::Done);
    assert_eq!(problem(admin.renting_join_token(renting.id).await).code, Code::WrongState);

    // It is paid for since it was reserved, at the price that the settings say.
    let told = async || admin.ledger("host=h1").await.unwrap();
    let is_priced = |ledger: &Ledger| ledger.totals.paid_nanousd > 0;
    for _ in 0..300 {
        if is_priced(&told().await) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let ledger = told().await;
    let paid = ledger.items.iter().find(|line| line.paid_nanousd.is_some()).expect("a line with a price");
    assert_eq!((paid.kind, paid.market.as_deref()), (LedgerKind::Idle, Some("home/big/on_demand")));
    assert_eq!((paid.price_nanousd, paid.on_demand_nanousd), (Some(50_000_000), paid.paid_nanousd));
    assert_eq!(paid.paid_nanousd.unwrap(), (50_000_000 * (paid.to_ms - paid.from_ms)).div_ceil(3_600_000));
    assert_eq!(admin.markets().await.unwrap()[0].price_nanousd_per_hour, 50_000_000);

    let back = admin.return_renting(renting.id, false).await.unwrap();
    assert_eq!(
        (back.kind, back.phase),
        (OperationKind::HostReturn, Phase::Done),
        "nothing was launched, so it is over at once"
    );
    let ended = admin.renting(renting.id).await.unwrap();
    assert_eq!((ended.state, ended.end), (RentingState::Ended, Some(RentingEnd::Returned)));
    assert!(test.state().need::<HostRecord>(&renting.host).await.unwrap().is_removed);
    assert_eq!(problem(admin.return_renting(renting.id, false).await).code, Code::WrongState);
    // Name and machine are free for the next one; given back before its agent joined, its order is undone.
    let third = admin.rent_host("home", &wanted("h1")).await.unwrap();
    let again = reaches(&admin, "h1", RentingState::Launched).await;
    assert_eq!(again.address.as_deref(), Some("192.0.2.7"));
    admin.return_renting(again.id, false).await.unwrap();
    assert_eq!(admin.operation(third.id).await.unwrap().phase, Phase::RolledBack);
    test.stop().await;
}

#[tokio::test]
async fn what_cannot_be_rented_is_refused_by_name_and_only_admins_of_all_rent() {
    let test = TestController::start_with(tempfile::tempdir().unwrap(), PROVIDERS).await;
    let admin = test.admin_client();
    for (name, provider) in [("home", "rack"), ("away", "static")] {
        let cloud = supercloud_api::CloudCreate { name: name.parse().unwrap(), provider: provider.into() };
        admin.create_cloud(&cloud).await.unwrap();
    }
    let none = problem(admin.rent_host("away", &wanted("h")).await);
    assert!(none.code == Code::Unsupported && none.detail.contains("[[providers]]"), "{none:?}");
    let spot = HostRent { tenure: Tenure::Spot, ..wanted("h") };
    assert_eq!(problem(admin.rent_host("home", &spot).await).code, Code::Unsupported);
    let priced = HostRent { max_price_nanousd_per_hour: Some(1), ..wanted("h") };
    assert_eq!(problem(admin.rent_host("home", &priced).await).code, Code::BadRequest);
    let (_, operator) = test.project("p").await;
    assert_eq!(problem(test.client(&operator).rent_host("home", &wanted("h")).await).code, Code::Forbidden);
    let viewer = test.token("p", Role::Viewer).await.secret;
    assert_eq!(problem(test.client(&viewer).rentings().await).code, Code::Forbidden);
    assert!(admin.rentings().await.unwrap().is_empty());
    test.stop().await;
}

#[test]
fn settings_of_providers_say_what_is_wrong() {
    let parse = |text: &str| crate::app::Config::parse(&format!("data_dir = '/x'\n{text}"), "c.toml");
    assert_eq!(parse(PROVIDERS).unwrap().providers.len(), 1);
    let open = |text: &str| crate::renting::Providers::open(&parse(text).unwrap().providers).unwrap_err().to_string();
    let twice = format!("{PROVIDERS}{PROVIDERS}");
    assert!(open(&twice).contains("provider rack: there are two"), "{}", open(&twice));
    assert!(open(&PROVIDERS.replace("'rack'", "'Rack 1'")).contains("lower-case"));
    assert!(open(&PROVIDERS.replace("'0.05'", "'cheap'")).contains("usd_per_hour"));
    let ec2 = "[[providers]]\nname = 'aws'\ndriver = 'ec2'\nregion = 'eu-central-1'\nimage_id = 'IMAGE'\n";
    assert!(open(&ec2.replace("IMAGE", "debian")).contains("image_id is 'debian'"));
    #[cfg(not(feature = "ec2"))]
    assert!(open(&ec2.replace("IMAGE", "ami-1")).contains("--features ec2"));
    for (wrong, named) in [("vcpu", "vcpu"), ("drivers", "driver")] {
        let right = if wrong == "vcpu" { "vcpus" } else { "driver " };
        let error = parse(&PROVIDERS.replace(right, &format!("{wrong} "))).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}
