//! Pages and prefixes.

use std::{collections::BTreeSet, sync::Arc};

use super::{commit, key, large, prefix, put, value};
use crate::{Key, Prefix, Store, Txn, list};

pub(super) async fn pages_cover_everything_once(store: Arc<dyn Store>) {
    let paths: Vec<Key> = (0..257).map(|i| key(&format!("items/{i:05}"))).collect();
    for part in paths.chunks(100) {
        commit(&*store, part.iter().fold(Txn::new(), |txn, path| txn.put(path.clone(), value("v")))).await;
    }
    put(&*store, "items", "before").await;
    put(&*store, "items0", "after").await;
    for limit in [1, 7, 100, 256, 257, 258, usize::MAX] {
        let (mut seen, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let page = store.range(prefix("items/"), after, limit).await.expect("page");
            pages += 1;
            assert!(page.items.len() <= limit);
            assert!(!page.items.is_empty(), "a page before the end holds something");
            seen.extend(page.items.into_iter().map(|item| item.key));
            after = seen.last().cloned();
            if !page.more {
                break;
            }
        }
        assert_eq!(seen, paths, "limit {limit}");
        assert_eq!(pages, 257_usize.div_ceil(limit), "limit {limit}: `more` is exact");
    }
}

pub(super) async fn after_need_not_exist(store: Arc<dyn Store>) {
    for path in ["a/1", "a/3", "a/5", "b/1"] {
        put(&*store, path, "v").await;
    }
    let cases = [
        ("a/2", vec!["a/3", "a/5"]),
        ("a/3", vec!["a/5"]),
        ("a/5", vec![]),
        ("a", vec!["a/1", "a/3", "a/5"]),
        ("0", vec!["a/1", "a/3", "a/5"]),
        ("a/9", vec![]),
        ("a0", vec![]),
        ("b", vec![]),
        ("z", vec![]),
    ];
    for (after, expected) in cases {
        let page = store.range(prefix("a/"), Some(key(after)), 10).await.expect("page");
        let seen: Vec<_> = page.items.iter().map(|item| item.key.as_str()).collect();
        assert_eq!((seen, page.more), (expected, false), "after {after}");
    }
    let page = store.range(Prefix::all(), Some(key("a/5")), 10).await.expect("page");
    assert_eq!(page.items.len(), 1);
}

pub(super) async fn pages_go_back_as_they_go_on(store: Arc<dyn Store>) {
    for path in ["a", "a/1", "a/3", "a/5", "a0", "b/1"] {
        put(&*store, path, "v").await;
    }
    for (before, expected) in [
        (None, vec!["a/5", "a/3", "a/1"]),
        (Some("a/5"), vec!["a/3", "a/1"]),
        (Some("a/4"), vec!["a/3", "a/1"]),
        (Some("a/1"), vec![]),
        (Some("a"), vec![]),
        (Some("0"), vec![]),
        (Some("b"), vec!["a/5", "a/3", "a/1"]),
        (Some("z"), vec!["a/5", "a/3", "a/1"]),
    ] {
        for limit in [1, 2, 3, 4] {
            let (mut seen, mut from) = (Vec::new(), before.map(key));
            loop {
                let page = store.range_back(prefix("a/"), from.clone(), limit).await.expect("page");
                assert!(page.items.len() <= limit, "before {before:?}, limit {limit}");
                seen.extend(page.items.into_iter().map(|item| item.key));
                from = seen.last().cloned();
                if !page.more {
                    break;
                }
            }
            let seen: Vec<_> = seen.iter().map(Key::as_str).collect();
            assert_eq!(seen, expected, "before {before:?}, limit {limit}");
        }
    }
    let page = store.range_back(Prefix::all(), None, 1).await.expect("page");
    assert_eq!((page.items[0].key.as_str(), page.more), ("b/1", true));
    assert!(store.range_back(Prefix::all(), None, 0).await.is_err());
}

pub(super) async fn large_values_are_paged(store: Arc<dyn Store>) {
    // More than any implementation puts in one page or message.
    let count: u8 = 20;
    for i in 0..count {
        commit(&*store, Txn::new().put(key(&format!("large/{i:03}")), large(900 << 10, i))).await;
    }
    let (items, _) = list(&*store, &prefix("large/")).await.expect("list");
    assert_eq!(items.len(), usize::from(count));
    for (i, item) in (0..count).zip(&items) {
        assert_eq!(item.value, large(900 << 10, i), "value {i}");
    }
}

pub(super) async fn prefixes_are_bytes(store: Arc<dyn Store>) {
    let paths = [
        "a",
        "a!",
        "a-b",
        "a/b",
        "a/b/c",
        "a/bc",
        "a/~",
        "a/ä",
        "a/\u{7ff}",
        "a/\u{ffff}",
        "a/\u{10ffff}",
        "a/\u{10ffff}x",
        "a/\u{10ffff}\u{10ffff}",
        "a0",
        "ab",
        "b",
        "\u{10ffff}",
        "\u{10ffff}/x",
    ];
    let txn = paths.iter().fold(Txn::new(), |txn, path| txn.put(key(path), value("v")));
    commit(&*store, txn).await;
    let mut prefixes: BTreeSet<String> = ["", "c", "a/b/", "a/c", "\u{10fffe}"].map(str::to_owned).into();
    for path in paths {
        prefixes.insert(path.to_owned());
        prefixes.extend(path.char_indices().map(|(at, _)| path[..at].to_owned()));
    }
    for text in prefixes {
        let mut expected: Vec<&str> = paths.iter().copied().filter(|path| path.starts_with(&text)).collect();
        expected.sort_unstable();
        let (items, _) = list(&*store, &prefix(&text)).await.expect("list");
        let seen: Vec<_> = items.iter().map(|item| item.key.as_str()).collect();
        assert_eq!(seen, expected, "prefix {text:?}");
    }
}
