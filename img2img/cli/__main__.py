from img2img.cli import main

main(prog_name="img2img")
