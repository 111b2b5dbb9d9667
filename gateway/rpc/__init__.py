"""The gRPC front end of ``img2img.v1.Img2ImgService``. Contract: proto/img2img/v1/img2img.proto."""
