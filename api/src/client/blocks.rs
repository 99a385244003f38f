//! Contents as streams of blocks.

use reqwest::{Method, StatusCode};

use super::{Client, ClientError, REQUEST_BUDGET, Result, refusal};
use crate::blocks::{BlocksError, Decoder, Item};

impl Client {
    /// The blocks of a content that are not all zeros, or their digests; `path` ends with `/blocks`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn blocks(&self, path: &str, range: std::ops::Range<u32>, digests: bool) -> Result<BlockStream> {
        let url = self.url(path);
        let query = [("from_block", range.start.to_string()), ("to_block", range.end.to_string())];
        let request = self.request(Method::GET, path).query(&query).query(&[("digests", digests)]);
        let response = tokio::time::timeout(REQUEST_BUDGET, request.send()).await;
        let response = response
            .map_err(|_| ClientError::Silent { url: url.clone(), budget: REQUEST_BUDGET })?
            .map_err(|source| ClientError::Transport { url: url.clone(), source })?;
        if response.status() != StatusCode::OK {
            return Err(refusal(url, response).await);
        }
        Ok(BlockStream { response, decoder: Decoder::default(), url })
    }
}

/// The blocks of a content, as they come.
#[derive(Debug)]
pub struct BlockStream {
    response: reqwest::Response,
    decoder: Decoder,
    url: String,
}

impl BlockStream {
    /// What comes next, checked; ends with [`Item::End`].
    ///
    /// # Errors
    /// [`ClientError::Transport`] when the connection broke off, [`ClientError::Blocks`] when it ended early or was silent for
    /// [`REQUEST_BUDGET`], or what came is wrong. Nothing comes after an error.
    pub async fn next(&mut self) -> Result<Item> {
        loop {
            let wrong = |source| ClientError::Blocks { url: self.url.clone(), source };
            if let Some(item) = self.decoder.next_item().map_err(wrong)? {
                return Ok(item);
            }
            match tokio::time::timeout(REQUEST_BUDGET, self.response.chunk()).await {
                Ok(Ok(Some(piece))) => self.decoder.push(&piece),
                Ok(Ok(None)) | Err(_) => {
                    return Err(ClientError::Blocks { url: self.url.clone(), source: BlocksError::BrokeOff });
                }
                Ok(Err(source)) => return Err(ClientError::Transport { url: self.url.clone(), source }),
            }
        }
    }
}
