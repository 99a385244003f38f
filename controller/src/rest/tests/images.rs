//! Uploads.

use bytes::Bytes;
use supercloud_api::{Code, ImageCreate, ImageImport, ImagePart, ImageState};

use super::{TestController, problem};

#[tokio::test]
async fn an_upload_goes_on_where_it_stopped_also_after_a_restart() {
    let test = TestController::start().await;
    let (_, secret) = test.project("p").await;
    let client = test.client(&secret);
    let wanted = ImageCreate { name: "disk".parse().unwrap(), project: None, cmdline: Some("quiet".into()) };
    client.create_image(&wanted).await.unwrap();
    assert_eq!(problem(client.create_image(&wanted).await).code, Code::NameTaken);
    let early = problem(client.import_image("disk", &ImageImport::default()).await);
    assert_eq!(early.code, Code::WrongState);
    let piece = Bytes::from(vec![7u8; 1 << 20]);
    let after = client.upload_part("disk", ImagePart::Disk, 0, piece.clone()).await.unwrap();
    assert_eq!(after.uploaded[0].bytes, 1 << 20);
    client.upload_part("disk", ImagePart::Disk, 0, piece.clone()).await.unwrap();
    let hole = problem(client.upload_part("disk", ImagePart::Disk, 5, piece.clone()).await);
    assert_eq!(hole.code, Code::WrongState);
    assert!(hole.detail.contains("1048576 bytes of this part are kept"), "{}", hole.detail);

    let test = TestController::start_in(test.stop().await).await;
    let client = test.client(&secret);
    let image = client.image("disk").await.unwrap();
    assert_eq!((image.state, image.uploaded[0].bytes), (ImageState::Uploading, 1 << 20));
    client.upload_part("disk", ImagePart::Disk, 1 << 20, piece).await.unwrap();
    // Who goes on can see that it is the same file.
    let kept = client.uploaded_digest("disk", ImagePart::Disk, 10, 1 << 20).await.unwrap();
    assert_eq!((kept.bytes, kept.blake3), (1 << 20, blake3::hash(&[7; 1 << 20]).to_hex().to_string()));
    let none = problem(client.uploaded_digest("disk", ImagePart::Kernel, 0, 1).await);
    let too_long = problem(client.uploaded_digest("disk", ImagePart::Disk, 0, (1 << 30) + 1).await);
    assert_eq!((none.code, too_long.code), (Code::NotFound, Code::BadRequest));
    let large = Bytes::from(vec![0u8; crate::rest::MAX_PIECE_BYTES + 1]);
    assert_eq!(problem(client.upload_part("disk", ImagePart::Disk, 2 << 20, large).await).code, Code::TooLarge);
    let operation = client.import_image("disk", &ImageImport::default()).await.unwrap();
    assert_eq!(operation.image, Some(image.id));
    let ended = client.wait(operation.id, std::time::Duration::from_secs(60), |_| {}).await.unwrap();
    assert!(ended.phase.is_terminal());
    client.delete_image("disk").await.unwrap();
    assert_eq!(problem(client.image("disk").await).code, Code::NotFound);
    test.stop().await;
}

#[tokio::test]
async fn the_slow_uploads_of_one_token_stop_no_others() {
    let test = TestController::start().await;
    let (_, secret) = test.project("p").await;
    let (_, other) = test.project("q").await;
    for secret in [&secret, &other] {
        let wanted = ImageCreate { name: "disk".parse().unwrap(), project: None, cmdline: None };
        test.client(secret).create_image(&wanted).await.unwrap();
    }
    let url = format!("https://{}/v1/images/disk/parts/disk?offset=0", test.address());
    let slow = |http: &reqwest::Client| http.put(&url).bearer_auth(&secret);
    let _held = test.trickle(slow, "127.0.0.1", 12, 10).await;
    let piece = Bytes::from_static(b"piece");
    let after = test.client(&other).upload_part("disk", ImagePart::Disk, 0, piece).await.unwrap();
    assert_eq!(after.uploaded[0].bytes, 5);
    test.stop().await;
}
