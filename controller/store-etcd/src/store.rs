//! The calls.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::{
    GetOptions, KvClient, MaintenanceClient, ResponseHeader, SortOrder, SortTarget, Txn as EtcdTxn, TxnOp,
    TxnOpResponse, WatchClient,
};
use supercloud_store::{
    BoxFuture, Health, Key, MAX_PAGE_BYTES, MAX_PAGE_ITEMS, Page, Prefix, Store, StoreError, Txn, TxnOutcome,
    Versioned, WatchStream,
};

use crate::{
    EtcdOptions, connect,
    fault::{self, Meaning},
    translate::{Namespace, number},
    watch,
};

/// Largest answer to a transaction, in bytes: the values of 100 compared keys, and room.
const MAX_TXN_ANSWER_BYTES: usize = 110 << 20;
/// Largest answer to a range, in bytes. etcd limits a page by count only, so a page of more is asked for again, smaller.
const MAX_RANGE_ANSWER_BYTES: usize = 2 * MAX_PAGE_BYTES;
/// A page that stays below this may be larger the next time.
const SMALL_PAGE_BYTES: usize = MAX_PAGE_BYTES / 4;

/// In which order of the keys a page is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Onward,
    Back,
}

/// A [`Store`] in an etcd cluster. Cheap to clone.
///
/// Connections are made again as needed; calls fail with retryable errors (or an unknown outcome) meanwhile, and watches wait.
#[derive(Clone)]
pub struct EtcdStore {
    range: KvClient,
    txn: KvClient,
    maintenance: MaintenanceClient,
    watch: WatchClient,
    namespace: Namespace,
    call_budget: Duration,
    /// How many items to ask for in a page, learned from their sizes.
    page_items: Arc<AtomicUsize>,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// Connects to a cluster and sees that it answers. `endpoints` are URLs: `https://etcd-1.example.org:2379`, or
    /// `http://127.0.0.1:2379` for a server on this machine.
    pub async fn connect(endpoints: &[String], options: &EtcdOptions) -> Result<Self, StoreError> {
        let client = connect::client(endpoints, options).await?;
        let store = Self {
            range: client.kv_client().max_decoding_message_size(MAX_RANGE_ANSWER_BYTES),
            txn: client.kv_client().max_decoding_message_size(MAX_TXN_ANSWER_BYTES),
            maintenance: client.maintenance_client(),
            watch: client.watch_client().max_decoding_message_size(watch::MAX_MESSAGE_BYTES),
            namespace: Namespace::new(&options.namespace),
            call_budget: options.call_budget,
            page_items: Arc::new(AtomicUsize::new(MAX_PAGE_ITEMS)),
        };
        store.revision().await?;
        Ok(store)
    }

    /// The newest revision, read from the quorum.
    async fn revision(&self) -> Result<u64, StoreError> {
        let (start, _) = self.namespace.range(&Prefix::all());
        let mut client = self.range.clone();
        let reading = client.get(start, Some(GetOptions::new().with_count_only()));
        let answer = fault::within(self.call_budget, reading).await.map_err(|fault| fault.reading("read from etcd"))?;
        self.header(answer.header())
    }

    fn header(&self, header: Option<&ResponseHeader>) -> Result<u64, StoreError> {
        match header.map(|header| number(header.revision())) {
            Some(revision) if revision > 0 => Ok(revision),
            _ => Err(self.namespace.damaged("an answer of etcd has no revision".into())),
        }
    }

    async fn run(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.validate()?;
        if txn.compares.is_empty() && txn.ops.is_empty() {
            // etcd answers an empty transaction without asking its quorum.
            return Ok(TxnOutcome::Committed { revision: self.revision().await? });
        }
        let compares: Vec<_> = txn.compares.iter().map(|compare| self.namespace.compare(compare)).collect();
        let ops: Vec<_> = txn.ops.iter().map(|op| self.namespace.op(op)).collect();
        let reads: Vec<_> =
            txn.compares.iter().map(|compare| TxnOp::get(self.namespace.key(&compare.key), None)).collect();
        let request = EtcdTxn::new().when(compares).and_then(ops).or_else(reads);
        let mut client = self.txn.clone();
        let answer = fault::within(self.call_budget, client.txn(request)).await.map_err(|fault| {
            if txn.ops.is_empty() { fault.reading("compare in etcd") } else { fault.writing("change etcd") }
        })?;
        if answer.succeeded() {
            return Ok(TxnOutcome::Committed { revision: self.header(answer.header())? });
        }
        let mut current = Vec::with_capacity(txn.compares.len());
        for response in answer.op_responses() {
            let TxnOpResponse::Get(mut found) = response else {
                return Err(self.namespace.damaged("etcd answers a read with something else".into()));
            };
            current.push(found.take_kvs().into_iter().next().map(|entry| self.namespace.read(entry)).transpose()?);
        }
        let answered = current.len() == txn.compares.len()
            && txn.compares.iter().zip(&current).all(|(c, found)| found.as_ref().is_none_or(|f| f.key == c.key));
        if !answered {
            return Err(self.namespace.damaged("etcd answers other reads than asked".into()));
        }
        Ok(TxnOutcome::Conflict { current })
    }

    async fn page(&self, prefix: &Prefix, from: Option<&Key>, way: Way, limit: usize) -> Result<Page, StoreError> {
        if limit == 0 {
            return Err(StoreError::InvalidArgument { reason: "a page's limit is 1 or more".into() });
        }
        let (mut start, mut end) = self.namespace.range(prefix);
        match (from, way) {
            // The first byte string after it.
            (Some(after), Way::Onward) => start = start.max([self.namespace.key(after).as_slice(), &[0]].concat()),
            (Some(before), Way::Back) => end = end.min(self.namespace.key(before)),
            (None, _) => {}
        }
        if start >= end {
            let revision = self.revision().await?;
            return Ok(Page { items: vec![], revision, more: false });
        }
        let deadline = Instant::now() + self.call_budget;
        let limit = limit.min(MAX_PAGE_ITEMS);
        loop {
            let ask = limit.min(self.page_items.load(Ordering::Relaxed)).max(1);
            let mut options = GetOptions::new().with_range(end.clone()).with_limit(i64::try_from(ask).unwrap_or(1));
            if way == Way::Back {
                options = options.with_sort(SortTarget::Key, SortOrder::Descend);
            }
            let mut client = self.range.clone();
            let left = deadline.saturating_duration_since(Instant::now());
            let mut answer = match fault::within(left, client.get(start.clone(), Some(options))).await {
                Ok(answer) => answer,
                Err(fault) if fault.meaning() == Meaning::AnswerTooLarge && ask > 1 => {
                    self.page_items.store(ask / 2, Ordering::Relaxed);
                    continue;
                }
                Err(fault) => return Err(fault.reading("read from etcd")),
            };
            let (revision, more) = (self.header(answer.header())?, answer.more());
            let items = answer.take_kvs().into_iter().map(|entry| self.namespace.read(entry));
            let items: Vec<Versioned> = items.collect::<Result<_, _>>()?;
            let follows = |a: &Key, b: &Key| if way == Way::Onward { a < b } else { a > b };
            let ordered = items.is_sorted_by(|a, b| follows(&a.key, &b.key));
            let inside =
                items.iter().all(|item| prefix.matches(&item.key) && from.is_none_or(|from| follows(from, &item.key)));
            if !ordered || !inside || items.len() > ask || (more && items.is_empty()) {
                return Err(self.namespace.damaged("etcd answers another range than asked".into()));
            }
            let bytes: usize = items.iter().map(|item| item.value.len()).sum();
            if items.len() == ask && bytes < SMALL_PAGE_BYTES {
                self.page_items.fetch_max((2 * ask).min(MAX_PAGE_ITEMS), Ordering::Relaxed);
            }
            return Ok(Page { items, revision, more });
        }
    }

    async fn one(&self, key: &Key) -> Result<Option<Versioned>, StoreError> {
        let mut client = self.range.clone();
        let reading = client.get(self.namespace.key(key), None);
        let mut answer =
            fault::within(self.call_budget, reading).await.map_err(|fault| fault.reading("read from etcd"))?;
        let found = answer.take_kvs().into_iter().next().map(|entry| self.namespace.read(entry)).transpose()?;
        match found {
            Some(found) if found.key != *key => {
                Err(self.namespace.damaged("etcd answers another key than asked".into()))
            }
            found => Ok(found),
        }
    }

    async fn drop_history(&self, revision: u64) -> Result<(), StoreError> {
        let future = |newest: &dyn fmt::Display| StoreError::InvalidArgument {
            reason: format!("revision {revision} to compact lies after the newest{newest}"),
        };
        let wanted = i64::try_from(revision).map_err(|_| future(&""))?;
        if revision == 0 {
            return Ok(());
        }
        let mut client = self.txn.clone();
        match fault::within(self.call_budget, client.compact(wanted, None)).await {
            Ok(_) => Ok(()),
            Err(fault) => match fault.meaning() {
                // Somebody was faster.
                Meaning::Compacted => Ok(()),
                Meaning::Future => Err(future(&"")),
                // Repeating it does no harm.
                _ => Err(fault.reading("compact etcd's history")),
            },
        }
    }
}

impl Store for EtcdStore {
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        Box::pin(self.run(txn))
    }

    fn get(&self, key: Key) -> BoxFuture<'_, Result<Option<Versioned>, StoreError>> {
        Box::pin(async move { self.one(&key).await })
    }

    fn range(&self, prefix: Prefix, after: Option<Key>, limit: usize) -> BoxFuture<'_, Result<Page, StoreError>> {
        Box::pin(async move { self.page(&prefix, after.as_ref(), Way::Onward, limit).await })
    }

    fn range_back(&self, prefix: Prefix, before: Option<Key>, limit: usize) -> BoxFuture<'_, Result<Page, StoreError>> {
        Box::pin(async move { self.page(&prefix, before.as_ref(), Way::Back, limit).await })
    }

    fn watch(&self, prefix: Prefix, from_revision: u64) -> WatchStream {
        watch::stream(self.watch.clone(), self.namespace.clone(), prefix, from_revision, self.call_budget)
    }

    fn compact(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.drop_history(revision))
    }

    fn health(&self) -> BoxFuture<'_, Result<Health, StoreError>> {
        Box::pin(async move {
            let revision = self.revision().await?;
            let mut client = self.maintenance.clone();
            let status = fault::within(self.call_budget, client.status()).await;
            let status = status.map_err(|fault| fault.reading("ask etcd for its status"))?;
            // An alarm such as NOSPACE: etcd reads, but does not write.
            if let Some(alarm) = status.errors().first() {
                let source = Some(alarm.chars().take(200).collect::<String>().into());
                return Err(StoreError::Failed { what: "etcd raises an alarm", source });
            }
            Ok(Health { backend: "etcd", revision, size_bytes: Some(number(status.db_size())) })
        })
    }
}
