package hidream

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"google.golang.org/grpc"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Download writes one finished image into a file, which appears whole or not at all.
//
// What arrived before the connection was lost, or the process ended, is kept beside the file and not
// asked for again. The SHA-256 is checked at the end: other bytes are thrown away, and the error wraps
// ErrBrokenStream.
func (c *Client) Download(
	ctx context.Context,
	jobID string,
	imageIndex int32,
	path string,
	policy ReconnectPolicy,
) (*hidreamv1.ImageInfo, error) {
	job, err := c.Get(ctx, jobID)
	if err != nil {
		return nil, err
	}
	part, err := openPart(path, jobID, imageIndex)
	if err != nil {
		return nil, err
	}
	defer part.close()
	// Absent from a job that has not drawn it yet: the server then says so in its own words.
	for _, info := range job.GetImages() {
		if info.GetIndex() == imageIndex {
			part.info = info
		}
	}
	if !part.isWhole() {
		err := resume(ctx, policy,
			func(ctx context.Context) (grpc.ServerStreamingClient[hidreamv1.DownloadImageResponse], error) {
				return c.stub.DownloadImage(ctx, &hidreamv1.DownloadImageRequest{
					JobId: jobID, ImageIndex: imageIndex, Offset: part.size,
				})
			},
			func(response *hidreamv1.DownloadImageResponse) error { return part.add(response.GetChunk()) })
		if err != nil && !errors.Is(err, errStop) {
			return nil, err
		}
	}
	return part.info, part.save(path)
}

// part is an image that has not arrived whole; its file's name says which image it is, so that no other
// is ever continued with it.
type part struct {
	file   *os.File
	index  int32
	info   *hidreamv1.ImageInfo
	digest hash.Hash
	size   int64
}

func partPath(path, jobID string, imageIndex int32) string {
	name := fmt.Sprintf(".%s.%s-%d.part", filepath.Base(path), jobID, imageIndex)
	return filepath.Join(filepath.Dir(path), name)
}

func openPart(path, jobID string, imageIndex int32) (*part, error) {
	file, err := os.OpenFile(partPath(path, jobID, imageIndex), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	p := &part{file: file, index: imageIndex, digest: sha256.New()}
	if p.size, err = io.Copy(p.digest, file); err != nil {
		file.Close()
		return nil, err
	}
	return p, nil
}

func (p *part) isWhole() bool {
	return p.info != nil && p.size >= p.info.GetSizeBytes()
}

func (p *part) add(chunk *hidreamv1.ImageChunk) error {
	if chunk.GetOffset() != p.size {
		return fmt.Errorf("%w: image %d: a piece at byte %d after byte %d",
			ErrBrokenStream, p.index, chunk.GetOffset(), p.size)
	}
	p.info = chunk.GetImage()
	if _, err := p.file.Write(chunk.GetData()); err != nil {
		return err
	}
	p.digest.Write(chunk.GetData())
	p.size += int64(len(chunk.GetData()))
	if p.isWhole() {
		return errStop
	}
	return nil
}

func (p *part) save(path string) error {
	if !p.isWhole() {
		return fmt.Errorf("%w: image %d: it ended before the image did", ErrBrokenStream, p.index)
	}
	if p.size != p.info.GetSizeBytes() || !bytes.Equal(p.digest.Sum(nil), p.info.GetSha256()) {
		return errors.Join(
			fmt.Errorf("%w: image %d: the bytes have another SHA-256 than announced; they were thrown away",
				ErrBrokenStream, p.index),
			os.Remove(p.file.Name()))
	}
	return os.Rename(p.file.Name(), path)
}

func (p *part) close() {
	if p.size == 0 {
		os.Remove(p.file.Name())
	}
	p.file.Close()
}
