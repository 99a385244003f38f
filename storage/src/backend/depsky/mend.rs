//! Mending: what members lack, or have wrong, is made anew from what the others have. So is a member filled that takes another's
//! place.

use bytes::Bytes;

use super::{CloudOfClouds, Inner, MEND_GRACE, piece};
use crate::{
    backend::{ObjectKey, StoreError},
    volume::FetchLimit,
};

/// Names that are listed together.
const LIST_AT_ONCE: usize = 1000;
/// Objects that are mended at once.
const AT_ONCE: usize = 8;

/// What mending found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mending {
    /// Objects that were looked at.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Pieces that were missing or wrong at a member and are there now.
    pub mended: u64,
    /// Pieces that may be missing still: their member does not answer.
    pub unanswered: u64,
    /// Objects of which there are too few pieces: what somebody who died was writing or deleting, or lost.
    pub unreadable: u64,
}

impl Mending {
    /// Why it cannot be said that all of the store is there, when it cannot: then no other store may be given up.
    #[must_use]
    pub fn shortfall(&self) -> Option<&'static str> {
        if self.unanswered > 0 {
            return Some("some pieces may be missing still: say it again when all stores answer");
        }
        (self.unreadable > 0).then_some(
            "some objects cannot be read: run `supercloud volume check` of every volume before a store is given up",
        )
    }
}

impl Inner {
    /// Reads an object from all members and mends what is not right at one that answers.
    pub(super) async fn mend(&self, key: &ObjectKey) -> Result<(Bytes, Mending), StoreError> {
        if key.chunk_name().is_none() {
            let (bytes, mended, unanswered) = self.mend_register(key).await?;
            let len = bytes.len() as u64;
            return Ok((bytes, Mending { objects: 1, bytes: len, mended, unanswered, unreadable: 0 }));
        }
        let gathered = self.gather_all(key, MEND_GRACE).await;
        // Of several encodings (made by different versions of the program), the one of which most is there.
        let whole = gathered.by_encoding.iter().filter(|(_, pieces)| pieces.len() >= self.quorum.pieces());
        let whole = whole.max_by_key(|(encoding, pieces)| (pieces.len(), **encoding));
        let Some(bytes) = whole.and_then(|(_, pieces)| piece::join(self.quorum, pieces)) else {
            return Err(self.not_gathered(key, &gathered));
        };
        let sound: Vec<&Bytes> = gathered.by_encoding.values().flatten().map(piece::Piece::bytes).collect();
        let pieces = self.cut(key, bytes.clone()).await?;
        let is_answering = |index: &usize| gathered.failed.iter().all(|(failed, _)| failed != index);
        let lacking: Vec<usize> =
            self.all().into_iter().filter(is_answering).filter(|index| !sound.contains(&&pieces[*index])).collect();
        let mut mending = Mending {
            objects: 1,
            bytes: bytes.len() as u64,
            unanswered: gathered.failed.len() as u64,
            ..Mending::default()
        };
        if !lacking.is_empty() {
            let (given, failures) = self.give(key, &pieces, &lacking, lacking.len()).await;
            mending.mended = given as u64;
            mending.unanswered += failures.len() as u64;
        }
        Ok((bytes, mending))
    }
}

impl CloudOfClouds {
    /// Looks at every object of the store and mends it; `limit` is drawn from for each; `tell` hears how far it is.
    ///
    /// # Errors
    /// When more members than may fail do not answer.
    pub async fn mend_all(
        &self,
        limit: &FetchLimit,
        mut tell: impl FnMut(&Mending) + Send,
    ) -> Result<Mending, StoreError> {
        use futures::StreamExt as _;
        let mut all = Mending::default();
        let mut after: Option<String> = None;
        loop {
            let page = self.inner.list("", after.as_deref(), LIST_AT_ONCE).await?;
            let Some(last) = page.last() else { return Ok(all) };
            after = Some(last.key.as_str().to_owned());
            let mut mends = futures::stream::iter(page)
                .map(|entry| async move {
                    limit.draw(entry.len).await;
                    self.inner.mend(&entry.key).await.map(|(_, mending)| mending)
                })
                .buffer_unordered(AT_ONCE);
            while let Some(mended) = mends.next().await {
                match mended {
                    Ok(mended) => {
                        all.objects += mended.objects;
                        all.bytes += mended.bytes;
                        all.mended += mended.mended;
                        all.unanswered += mended.unanswered;
                    }
                    // Deleted meanwhile, or never whole.
                    Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => {
                        all.objects += 1;
                        all.unreadable += 1;
                    }
                    Err(error) => return Err(error),
                }
                tell(&all);
            }
        }
    }
}
