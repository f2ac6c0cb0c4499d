package hidream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Download writes one finished image into a file, which appears whole or not at all.
//
// What arrived before the connection was lost, or the process ended, is kept beside the file and not
// asked for again, unless the server has lost the image (codes.DataLoss). The SHA-256 is checked at the
// end: other bytes are thrown away, and the error wraps ErrBrokenImage.
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
			part.announced = info
		}
	}
	if !part.isWhole() {
		err := resume(ctx, policy, func(err error) error { return err },
			func(ctx context.Context) (grpc.ServerStreamingClient[hidreamv1.DownloadImageResponse], error) {
				return c.stub.DownloadImage(ctx, &hidreamv1.DownloadImageRequest{
					JobId: jobID, ImageIndex: imageIndex, Offset: part.size,
				})
			},
			func(response *hidreamv1.DownloadImageResponse) error { return part.add(response.GetChunk()) })
		if status.Code(err) == codes.DataLoss {
			return nil, errors.Join(err, os.Remove(part.file.Name()))
		}
		if err != nil && !errors.Is(err, errStop) {
			return nil, err
		}
	}
	return part.announced, part.save(path)
}

// part is an image that has not arrived whole; its file's name says which image it is, so that no other
// is ever continued with it.
type part struct {
	*imageCheck
	file *os.File
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
	p := &part{imageCheck: newImageCheck(imageIndex), file: file}
	if _, err := io.Copy(p.imageCheck, file); err != nil {
		file.Close()
		return nil, err
	}
	return p, nil
}

func (p *part) add(chunk *hidreamv1.ImageChunk) error {
	if err := p.imageCheck.add(chunk); err != nil {
		return err
	}
	if _, err := p.file.Write(chunk.GetData()); err != nil {
		return err
	}
	if p.isWhole() {
		return errStop
	}
	return nil
}

func (p *part) save(path string) error {
	err := p.finish()
	switch {
	case err != nil && p.isWhole():
		return errors.Join(err, os.Remove(p.file.Name()))
	case err != nil:
		return err // what has arrived may be gone on from
	}
	return os.Rename(p.file.Name(), path)
}

func (p *part) close() {
	if p.size == 0 {
		os.Remove(p.file.Name())
	}
	p.file.Close()
}
