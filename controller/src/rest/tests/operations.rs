//! Listings of operations: from either end, by what they are about, page by page.

use reqwest::Method;
use supercloud_api::{Code, Operation, Page, Phase};

use super::{TestController, guest, problem_of};
use crate::state::OperationRecord;

impl TestController {
    async fn operations(&self, query: &str) -> Page<Operation> {
        let path = format!("/v1/operations?{query}");
        let response = self.raw(Method::GET, &path, Some(&self.admin_secret())).send().await.unwrap();
        assert!(response.status().is_success(), "{query}: {}", response.text().await.unwrap());
        response.json().await.unwrap()
    }

    /// All pages of a listing: what each operation is about, and how many pages there were.
    async fn walked(&self, query: &str) -> (Vec<String>, usize) {
        let (mut names, mut next, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let page = self.operations(&format!("{query}{next}")).await;
            pages += 1;
            for operation in page.items {
                names.push(operation.reason.unwrap_or_default());
            }
            match page.next_page {
                Some(page) => next = format!("&page={page}"),
                None => return (names, pages),
            }
        }
    }
}

#[tokio::test]
async fn operations_are_listed_from_either_end_and_by_what_they_are_about() {
    let test = TestController::start().await;
    let world = test.world().await;
    for n in 0..7 {
        let mut wanted = guest(&format!("g{n}"));
        wanted.start = n >= 5;
        let made = world.client.create_guest(&wanted).await.unwrap();
        let phase = if n == 2 { Phase::Failed } else { made.phase };
        // No agent is there that would end what is begun.
        test.edit::<OperationRecord>(&made.id, |record| {
            record.operation.reason = Some(n.to_string());
            record.operation.phase = phase;
        })
        .await;
    }
    let walked = async |query: &str| test.walked(query).await;
    let named = |names: &[u32]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(walked("limit=3").await, (named(&[0, 1, 2, 3, 4, 5, 6]), 3));
    assert_eq!(walked("limit=3&newest=true").await, (named(&[6, 5, 4, 3, 2, 1, 0]), 3));
    assert_eq!(walked("limit=7&newest=true").await, (named(&[6, 5, 4, 3, 2, 1, 0]), 1), "no page follows the last");
    assert_eq!(walked("active=true").await, (named(&[5, 6]), 1));
    assert_eq!(walked("active=true&newest=true&limit=1").await.0, named(&[6, 5]));
    assert_eq!(walked("guest=g3&project=p&newest=true").await.0, named(&[3]));
    let third = world.client.guest("g3").await.unwrap().id;
    assert_eq!(walked(&format!("guest={third}&limit=1")).await.0, named(&[3]));
    assert_eq!(walked("phase=failed&newest=true").await.0, named(&[2]));
    let all = test.operations("newest=true").await.items;
    let fifth = all.iter().find(|operation| operation.reason.as_deref() == Some("5")).unwrap().created_at_ms;
    let since: Vec<_> = all.iter().filter(|one| one.created_at_ms >= fifth).map(|one| one.id).collect();
    for newest in ["", "&newest=true"] {
        let mut found: Vec<_> =
            test.operations(&format!("from_ms={fifth}{newest}")).await.items.iter().map(|one| one.id).collect();
        found.sort_by(|a, b| b.cmp(a));
        assert_eq!(found, since, "made at that time or later{newest}");
    }
    // Of one project nobody sees another's.
    let (_, other) = test.project("q").await;
    for query in ["newest=true", "active=true", &format!("guest={third}")] {
        let response = test.raw(Method::GET, &format!("/v1/operations?{query}"), Some(&other)).send().await.unwrap();
        assert_eq!(response.json::<Page<Operation>>().await.unwrap().items, [], "{query}");
    }
    for bad in ["newest=perhaps", "phase=over", "page=nonsense&newest=true", "active=1&page=x"] {
        let response = test.raw(Method::GET, &format!("/v1/operations?{bad}"), Some(&other)).send().await.unwrap();
        assert_eq!(problem_of(response).await.code, Code::BadRequest, "{bad}");
    }
    test.stop().await;
}
